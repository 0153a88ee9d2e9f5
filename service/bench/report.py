"""What a load's samples say: latency, throughput, and where the server spent the time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from service.bench.load import Load, Sample
from service.client import Timings

_SUFFIX = "_seconds"


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of times, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """One load. Rates and latencies are of the requests that were answered.

    ``failures`` counts the others by reason. ``stages`` are the server's own timings, as each answer
    carried them, and ``outside``: the rest of the latency, which is the network's and the client's.
    """

    concurrency: int
    answered: int
    failures: dict[str, int]
    elapsed_seconds: float
    requests_per_second: float
    tokens_per_second: float
    bytes_per_second: float
    mean_batch_requests: float
    latency_seconds: Distribution | None
    stages_seconds: dict[str, Distribution]


def summarize(load: Load, samples: Sequence[Sample], elapsed_seconds: float) -> Report:
    """The report of a load that took ``elapsed_seconds``."""
    answered = [(sample.latency_seconds, sample.timings) for sample in samples if sample.timings is not None]
    latencies = [latency for latency, _ in answered]
    timings = [timing for _, timing in answered]
    rate = len(answered) / elapsed_seconds if answered else 0.0
    return Report(
        concurrency=load.concurrency,
        answered=len(answered),
        failures=dict(Counter(sample.failure for sample in samples if sample.failure)),
        elapsed_seconds=elapsed_seconds,
        requests_per_second=rate,
        tokens_per_second=rate * load.shape.tokens,
        bytes_per_second=rate * load.shape.tensor_bytes,
        mean_batch_requests=float(np.mean([timing.batch_requests for timing in timings])) if timings else 0.0,
        latency_seconds=_distribution(latencies) if latencies else None,
        stages_seconds=_stages(latencies, timings) if timings else {},
    )


def _stages(latencies: Sequence[float], timings: Sequence[Timings]) -> dict[str, Distribution]:
    names = [field.name for field in fields(Timings) if field.name.endswith(_SUFFIX)]
    stages = {
        name.removesuffix(_SUFFIX): _distribution([getattr(timing, name) for timing in timings])
        for name in names
    }
    pairs = zip(latencies, timings, strict=True)
    stages["outside"] = _distribution([latency - timing.total_seconds for latency, timing in pairs])
    return stages


def _distribution(seconds: Sequence[float]) -> Distribution:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
    return Distribution(float(np.mean(seconds)), p50, p90, p99)

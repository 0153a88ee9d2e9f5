"""Where a server's time goes, from its own /metrics: ``python examples/stages.py [URL]``."""

import math
import sys
import urllib.request
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from rich import print as rich_print
from rich.table import Table

DEFAULT_URL = "http://127.0.0.1:9464/metrics"
METRIC = "fsa_request_stage_duration_seconds"


@dataclass
class Stage:
    """One stage's histogram, in seconds; ``buckets``: (upper bound, cumulative count), ascending."""

    buckets: list[tuple[float, float]] = field(default_factory=list)
    count: float = 0.0
    sum: float = 0.0

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """As Prometheus' histogram_quantile: linear inside a bucket."""
        rank, lower, below = share * self.count, 0.0, 0.0
        for upper, cumulative in self.buckets:
            if cumulative >= rank and cumulative > below:
                inside = (rank - below) / (cumulative - below)
                return lower if math.isinf(upper) else lower + (upper - lower) * inside
            lower, below = upper, cumulative
        return 0.0


def read(url: str = DEFAULT_URL) -> dict[str, Stage]:
    """The stages of the server whose metrics are at ``url``, in its order. Raises OSError."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return parse(response.read().decode())


def parse(exposition: str) -> dict[str, Stage]:
    """The stages in a Prometheus text exposition."""
    stages: dict[str, Stage] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples if family.name == METRIC else ():
            stage = stages.setdefault(sample.labels["stage"], Stage())
            match sample.name.removeprefix(METRIC):
                case "_bucket":
                    stage.buckets.append((float(sample.labels["le"]), sample.value))
                case "_count":
                    stage.count = sample.value
                case "_sum":
                    stage.sum = sample.value
    return stages


def table(stages: dict[str, Stage]) -> Table:
    """A row a stage, in milliseconds."""
    made = Table("stage", title="Server's time by stage, ms", title_justify="left")
    for heading in ("requests", "mean", "p50", "p99"):
        made.add_column(heading, justify="right")
    for name, stage in stages.items():
        times = (stage.mean, stage.quantile(0.5), stage.quantile(0.99))
        made.add_row(name, f"{stage.count:.0f}", *(f"{1e3 * seconds:.3f}" for seconds in times))
    return made


if __name__ == "__main__":
    rich_print(table(read(*sys.argv[1:2])))

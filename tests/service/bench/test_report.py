"""What a report says of its samples: answers are measured, failures counted by reason."""

import pytest

from service.bench.load import Load, Sample
from service.bench.report import summarize
from service.bench.workload import Shape
from service.client import Timings

SHAPE = Shape(100, 4, 2, 16, block_size=16, slots=0, dtype="float32")
LOAD = Load("target", SHAPE, concurrency=3, seconds=1, requests=None, timeout_seconds=1)


def answered(latency_seconds: float, total_seconds: float) -> Sample:
    return Sample(0.0, latency_seconds, Timings(0, 0, 0, 0, 0, 0, total_seconds, 2, 200))


def test_rates_and_latency_are_of_answers_and_failures_are_counted_by_reason() -> None:
    failed = [
        Sample(0, 9, None, "WORKER_LOST"),
        Sample(0, 9, None, "WORKER_LOST"),
        Sample(0, 9, None, "DRAINING"),
    ]
    report = summarize(LOAD, [answered(0.1, 0.04), answered(0.3, 0.24), *failed], elapsed_seconds=2)
    assert (report.answered, report.requests_per_second, report.tokens_per_second) == (2, 1, 100)
    assert report.bytes_per_second == SHAPE.tensor_bytes
    assert report.failures == {"WORKER_LOST": 2, "DRAINING": 1}
    assert report.latency_seconds is not None
    assert report.latency_seconds.p50 == pytest.approx(0.2)
    assert report.stages_seconds["total"].mean == pytest.approx(0.14)
    assert report.stages_seconds["outside"].mean == pytest.approx(0.06)
    assert report.mean_batch_requests == 2


def test_a_run_without_one_answer_still_reports_its_failures() -> None:
    report = summarize(LOAD, [Sample(0, 1, None, "UNAVAILABLE")], elapsed_seconds=1)
    assert (report.answered, report.latency_seconds, report.failures) == (0, None, {"UNAVAILABLE": 1})

"""examples/stages.py reads what a Prometheus client writes."""

import pytest
import stages
from prometheus_client import CollectorRegistry, Histogram, generate_latest


def test_stages_are_read_from_an_exposition() -> None:
    registry = CollectorRegistry()
    histogram = Histogram(stages.METRIC, "", ["stage"], buckets=(1, 2, 4), registry=registry)
    for seconds in (0.5, 1.5, 1.5, 3.0):
        histogram.labels("kernel").observe(seconds)
    histogram.labels("queue").observe(9)
    read = stages.parse(generate_latest(registry).decode())
    assert list(read) == ["kernel", "queue"]
    assert (read["kernel"].count, read["kernel"].mean) == (4, pytest.approx(6.5 / 4))
    # The second of four lies half-way through the two observations of the bucket from 1 to 2.
    assert read["kernel"].quantile(0.5) == pytest.approx(1.5)
    assert read["queue"].quantile(0.5) == 4  # beyond the last bound, that bound is all there is to say

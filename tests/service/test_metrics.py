"""The names and numbers that Prometheus sees."""

import socket
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service import metrics as metrics_module
from service.metrics import RESTART_CAUSES, SECONDS_BUCKETS, Metrics
from service.pb.fsa.v1 import attention_pb2

NAMES = {
    "fsa_requests",
    "fsa_request_duration_seconds",
    "fsa_request_stage_duration_seconds",
    "fsa_batch_requests",
    "fsa_batch_tokens",
    "fsa_queue_depth",
    "fsa_inflight_bytes",
    "fsa_rejected",
    "fsa_worker_up",
    "fsa_worker_restarts",
    "fsa_build_info",
    "fsa_gpu_memory_used_bytes",
    "fsa_gpu_memory_total_bytes",
}


@dataclass
class Worker:
    label: str = "cuda:0"
    is_up: bool = True
    restarts: Counter[str] = field(default_factory=Counter)
    memory_used_bytes: int = 10
    memory_total_bytes: int = 100


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_every_metric_has_its_name(metrics: Metrics) -> None:
    metrics.watch_workers([Worker()])
    metrics.set_build_info({"version": "1"})
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    # Counters' creation times are families of their own in the text format.
    assert {family.name for family in families if not family.name.endswith("_created")} == NAMES


def test_buckets_are_geometric_from_50_microseconds_to_60_seconds() -> None:
    ratios = [b / a for a, b in pairwise(SECONDS_BUCKETS)]
    assert (SECONDS_BUCKETS[0], SECONDS_BUCKETS[-1]) == (50e-6, 60.0)
    assert max(ratios) / min(ratios) < 1.01


def test_stages_are_the_numbers_of_the_response(metrics: Metrics) -> None:
    timings = attention_pb2.Timings(receive=1, queue=2, h2d=3, kernel=4, d2h=5, send=6)
    metrics.observe_stages(timings)
    found = samples(metrics)
    stages = ("decode", "queue", "h2d", "kernel", "d2h", "encode")
    sums = [found["fsa_request_stage_duration_seconds_sum", stage] for stage in stages]
    assert sums == [1, 2, 3, 4, 5, 6]


def test_gauges_and_workers_are_read_when_asked(metrics: Metrics) -> None:
    worker, depth = Worker(), [3]
    metrics.watch_workers([worker])
    metrics.watch_queue(lambda: depth[0])
    metrics.watch_inflight_bytes("host", lambda: depth[0] * 10)
    before = samples(metrics)
    worker.is_up, depth[0] = False, 4
    worker.restarts["killed"] += 2
    after = samples(metrics)
    assert (before["fsa_queue_depth",], after["fsa_queue_depth",]) == (3, 4)
    assert (before["fsa_inflight_bytes", "host"], after["fsa_inflight_bytes", "host"]) == (30, 40)
    assert (before["fsa_worker_up", "cuda:0"], after["fsa_worker_up", "cuda:0"]) == (1, 0)
    assert after["fsa_worker_restarts_total", "killed"] == 2
    assert after["fsa_gpu_memory_used_bytes", "cuda:0"] == 10


def test_what_alerts_look_for_is_there_before_it_happens(metrics: Metrics) -> None:
    worker = Worker()
    metrics.watch_workers([worker, Worker(label="cuda:1")])
    causes = ("killed", "exit", "start_timeout", "hang", "fatal_error", "protocol", "spawn_error")
    found = samples(metrics)
    assert [found["fsa_worker_restarts_total", cause] for cause in causes] == [0] * len(causes)
    assert set(causes) == set(RESTART_CAUSES)
    codes = ("INTERNAL", "DEADLINE_EXCEEDED", "UNAVAILABLE")
    assert [found["fsa_requests_total", code, "Attend"] for code in codes] == [0, 0, 0]
    worker.restarts["hang"] += 1
    metrics.observe_request("Attend", "INTERNAL", 0.1)
    found = samples(metrics)
    assert found["fsa_worker_restarts_total", "hang"] == 1
    assert found["fsa_requests_total", "INTERNAL", "Attend"] == 1


def test_memory_of_a_cpu_worker_is_no_gpu_memory(metrics: Metrics) -> None:
    metrics.watch_workers([Worker(label="cpu")])
    found = samples(metrics)
    assert ("fsa_worker_up", "cpu") in found
    assert ("fsa_gpu_memory_used_bytes", "cpu") not in found


def test_the_endpoint_serves_on_a_free_port_and_closes(metrics: Metrics) -> None:
    server = metrics.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        assert b"fsa_queue_depth" in response.read()
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "SILENCE_SECONDS", 0.2)
    server = Metrics().listen("127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            assert connection.recv(1) == b""
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
            assert response.status == 200
    finally:
        server.close()

"""Everything that Prometheus sees. No other module creates metrics."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.pb.fsa.v1 import attention_pb2

# How long a connection to the metrics may say nothing.
SILENCE_SECONDS = 10.0

# Each stage and the field of the response's Timings that holds the same number.
STAGE_FIELDS = {
    "decode": "receive",
    "queue": "queue",
    "h2d": "h2d",
    "kernel": "kernel",
    "d2h": "d2h",
    "encode": "send",
}

# What ends a worker: service.worker_process and service.worker_client.
RESTART_CAUSES = ("killed", "exit", "start_timeout", "hang", "fatal_error", "protocol", "spawn_error")
# The codes that alerts look for. A series that begins with its first event does not increase by it.
ALERTED_CODES = ("INTERNAL", "DEADLINE_EXCEEDED", "UNAVAILABLE")


def geometric(first: float, last: float, count: int) -> tuple[float, ...]:
    """``count`` bucket bounds from ``first`` to ``last``, each the same factor above the one before."""
    ratio = (last / first) ** (1 / (count - 1))
    return tuple(float(f"{first * ratio**i:.4g}") for i in range(count))


SECONDS_BUCKETS = geometric(50e-6, 60.0, 22)
REQUESTS_BUCKETS = geometric(1, 1024, 11)
TOKENS_BUCKETS = geometric(1, 1 << 20, 21)


class WorkerGauges(Protocol):
    """What is read from a worker when Prometheus asks."""

    @property
    def label(self) -> str: ...
    @property
    def is_up(self) -> bool: ...
    @property
    def restarts(self) -> Mapping[str, int]: ...
    @property
    def memory_used_bytes(self) -> int: ...
    @property
    def memory_total_bytes(self) -> int: ...


class Metrics:
    """The server's own registry and what feeds it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fsa_requests",
            "Requests answered, by method and gRPC code.",
            ["method", "code"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "fsa_request_duration_seconds",
            "From the arrival of a request's message to its answer, errors included.",
            ["method"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "fsa_request_stage_duration_seconds",
            "Where the time of answered requests went. h2d, kernel and d2h are of the whole batch.",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._batch_requests = Histogram(
            "fsa_batch_requests", "Requests in a batch.", buckets=REQUESTS_BUCKETS, registry=self.registry
        )
        self._batch_tokens = Histogram(
            "fsa_batch_tokens",
            "Query and key tokens in a batch.",
            buckets=TOKENS_BUCKETS,
            registry=self.registry,
        )
        self._rejected = Counter(
            "fsa_rejected",
            "Requests refused before they started, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._queue_depth = Gauge(
            "fsa_queue_depth", "Requests that wait for a batch.", registry=self.registry
        )
        self._inflight_bytes = Gauge(
            "fsa_inflight_bytes", "Bytes that requests and answers hold.", ["pool"], registry=self.registry
        )
        for stage in STAGE_FIELDS:
            self._stage_seconds.labels(stage)
        for code in ALERTED_CODES:
            self._requests.labels("Attend", code)

    def observe_request(self, method: str, code: str, seconds: float) -> None:
        self._requests.labels(method, code).inc()
        self._request_seconds.labels(method).observe(seconds)

    def observe_stages(self, timings: attention_pb2.Timings) -> None:
        """The very numbers that the response carries."""
        for stage, field in STAGE_FIELDS.items():
            self._stage_seconds.labels(stage).observe(getattr(timings, field))

    def observe_batch(self, num_requests: int, num_tokens: int) -> None:
        self._batch_requests.observe(num_requests)
        self._batch_tokens.observe(num_tokens)

    def count_rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def watch_queue(self, depth: Callable[[], int]) -> None:
        self._queue_depth.set_function(depth)

    def watch_inflight_bytes(self, pool: str, used: Callable[[], int]) -> None:
        """``pool``: host (the arenas) or workspace (planned, on the device)."""
        self._inflight_bytes.labels(pool).set_function(used)

    def watch_workers(self, workers: Iterable[WorkerGauges]) -> None:
        self.registry.register(_WorkerCollector(tuple(workers)))

    def set_build_info(self, versions: Mapping[str, str]) -> None:
        """One constant series whose labels are the versions in use."""
        gauge = Gauge("fsa_build_info", "Versions in use.", list(versions), registry=self.registry)
        gauge.labels(*versions.values()).set(1)

    def listen(self, host: str, port: int) -> "MetricsServer":
        """Serve ``/metrics`` from a thread. Port 0: any free one. Raises OSError when it cannot."""
        server, thread = start_http_server(port, host, self.registry)
        # A connection that asks nothing must not keep its thread and its descriptor for ever.
        patient = type("Handler", (server.RequestHandlerClass,), {"timeout": SILENCE_SECONDS})  # type: ignore[arg-type]
        server.RequestHandlerClass = patient
        return MetricsServer(server, thread)


class MetricsServer:
    """The HTTP server of ``/metrics``."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _WorkerCollector(Collector):
    """Reads the workers' state at each scrape, so that it cannot be stale."""

    def __init__(self, workers: tuple[WorkerGauges, ...]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("fsa_worker_up", "1 while the worker takes requests.", labels=["device"])
        restarts = CounterMetricFamily(
            "fsa_worker_restarts", "Workers started again, by what ended the last one.", labels=["cause"]
        )
        used = GaugeMetricFamily("fsa_gpu_memory_used_bytes", "Device memory in use.", labels=["device"])
        total = GaugeMetricFamily("fsa_gpu_memory_total_bytes", "Device memory there is.", labels=["device"])
        causes = dict.fromkeys(RESTART_CAUSES, 0)
        for worker in self._workers:
            up.add_metric([worker.label], float(worker.is_up))
            for cause, count in worker.restarts.items():
                causes[cause] = causes.get(cause, 0) + count
            if worker.label.startswith("cuda"):
                used.add_metric([worker.label], worker.memory_used_bytes)
                total.add_metric([worker.label], worker.memory_total_bytes)
        for cause, count in causes.items():
            restarts.add_metric([cause], count)
        return [up, restarts, used, total]

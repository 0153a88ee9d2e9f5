"""A real server process on free loopback ports, and raw gRPC to talk to it: for end-to-end tests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

ATTEND = "/fsa.v1.AttentionService/Attend"
SERVER_INFO = "/fsa.v1.AttentionService/GetServerInfo"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

START_SECONDS = 90.0

T = TypeVar("T")
_NUMBERS = {
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.bool: tensor_pb2.DTYPE_BOOL,
}
_DTYPES = {number: dtype for dtype, number in _NUMBERS.items()}


def eventually(probe: Callable[[], T], *, seconds: float = 10.0, what: str = "") -> T:
    """The first truthy value of ``probe``, or a failure when the time is up."""
    end = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or probe}"
        time.sleep(0.02)
    return value


@dataclass
class ServerProcess:
    """``python -m service`` with its ports; ``log`` is what it wrote to standard error."""

    process: subprocess.Popen[str]
    log: Path
    port: int
    metrics_port: int
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
        ]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(
        self, raw: bytes, *, method: str = ATTEND, timeout: float | None = 30.0, **options: Any
    ) -> bytes:
        """One unary call with bytes both ways; raises grpc.RpcError."""
        return self.channel.unary_unary(method)(raw, timeout=timeout, **options)

    def start_call(self, raw: bytes, *, timeout: float | None = 30.0) -> grpc.Future:
        return self.channel.unary_unary(ATTEND).future(raw, timeout=timeout)

    def attend(self, request: attention_pb2.AttendRequest, **options: Any) -> attention_pb2.AttendResponse:
        return attention_pb2.AttendResponse.FromString(self.call(request.SerializeToString(), **options))

    def info(self) -> attention_pb2.GetServerInfoResponse:
        return attention_pb2.GetServerInfoResponse.FromString(self.call(b"", method=SERVER_INFO))

    def health(self, service: str = "") -> str:
        request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
        response = health_pb2.HealthCheckResponse.FromString(self.call(request, method=HEALTH_CHECK))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def wait_for_health(self, status: str = "SERVING", *, seconds: float = START_SECONDS) -> None:
        eventually(lambda: self.health() == status, seconds=seconds, what=status)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Samples by name and label values."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    def worker_pids(self) -> list[int]:
        """The server's child processes; not one that is about to become a worker.

        Until that happens the server waits for it: frozen too early, it would freeze the server.
        """
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"service.worker" in _command_line(pid)]

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @contextmanager
    def frozen_worker(self) -> Iterator[None]:
        """While inside, the worker takes batches and does not get on with them."""
        (pid,) = self.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _command_line(pid: str) -> bytes:
    """Empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def running_server(log: Path, **settings: Any) -> Iterator[ServerProcess]:
    """A CPU server with ``settings``, perhaps not SERVING yet; gone, with its worker, at the end."""
    given = {"port": 0, "metrics_port": 0, "devices": "cpu", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FSA_")}
    environment |= {f"FSA_{name.upper()}": str(value) for name, value in given.items()}
    # One core for the worker leaves one for the server and the tests on the smallest machines.
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "service"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server did not start:\n{log.read_text()}"
        ports = json.loads(line)
        server = ServerProcess(process, log, ports["port"], ports["metrics_port"])
        yield server
        server.channel.close()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def tensor_message(values: torch.Tensor) -> tensor_pb2.Tensor:
    raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor_pb2.Tensor(dtype=_NUMBERS[values.dtype], shape=values.shape, inline=raw.numpy().tobytes())


def tensor_of(message: tensor_pb2.Tensor) -> torch.Tensor:
    shape, dtype = tuple(message.shape), _DTYPES[message.dtype]
    if not message.inline:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.inline), dtype=dtype).view(shape)


def request_of(case: Any, **fields: Any) -> attention_pb2.AttendRequest:
    """The AttendRequest of a Case (tests/fsa_core/conftest.py), asking for lse."""
    problem = case.problem
    if case.block_indices is None:
        pattern = pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense())
    else:
        indices = pattern_pb2.BlockIndices(
            indices=tensor_message(case.block_indices), block_size=problem.block_size
        )
        pattern = pattern_pb2.SparsityPattern(block_indices=indices)
    return attention_pb2.AttendRequest(
        q=tensor_message(case.q),
        k=tensor_message(case.k),
        v=tensor_message(case.v),
        pattern=pattern,
        cu_seqlens_q=case.cu_seqlens_q.tolist(),
        cu_seqlens_k=case.cu_seqlens_k.tolist(),
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
        return_lse=True,
        **fields,
    )


class NoDeadline:
    """What the servicer asks of a call's context, for calls in this process: answers are sent at once."""

    def time_remaining(self) -> None:
        return None

    def add_done_callback(self, callback: Callable[["NoDeadline"], None]) -> None:
        callback(self)


@dataclass(frozen=True)
class Refusal:
    """A failed call as its client sees it."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_seconds: float | None


def refusal_of(error: Any) -> Refusal:
    """Unpacks a grpc.RpcError; a failure of gRPC's own has no reason."""
    info, retry = error_details_pb2.ErrorInfo(), None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    assert info.domain == "fsa"
                elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                    retry = error_details_pb2.RetryInfo.FromString(detail.value)
    return Refusal(
        error.code().name,
        info.reason,
        error.details(),
        dict(info.metadata),
        None if retry is None else retry.retry_delay.ToNanoseconds() / 1e9,
    )


LEAK = re.compile(r"/[a-z]+/|\.py|0x[0-9a-f]{4}|Traceback|torch\.|google\.|Error\b|Exception")
"""What no message to a client may contain: paths, files, addresses, class names."""

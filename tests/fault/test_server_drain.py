"""SIGTERM: what is in flight is answered, what is new is sent elsewhere, and the process is gone."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.serving import ServerProcess, eventually, refusal_of, request_of, running_server


@pytest.fixture
def start(tmp_path: Path, device: torch.device) -> Iterator[Callable[..., ServerProcess]]:
    contexts = []

    def start(**settings: Any) -> ServerProcess:
        contexts.append(running_server(tmp_path / "log", devices=device.type, **settings))
        server = contexts[-1].__enter__()
        server.wait_for_health()
        return server

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def raw(make_case: Callable[..., Any]) -> bytes:
    return request_of(make_case()).SerializeToString()


def busy(server: ServerProcess, raw: bytes) -> list[grpc.Future]:
    """Calls that are in flight: two in the worker and two in the queue."""
    calls = [server.start_call(raw) for _ in range(4)]
    eventually(lambda: server.metrics()["fsa_inflight_bytes", "host"] > 0)
    eventually(lambda: server.metrics()["fsa_batch_requests_sum",] >= 2)
    return calls


def signalled(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: server.health() == "NOT_SERVING", seconds=5)


def reason_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    refusal = refusal_of(caught.value)
    return refusal.code, refusal.reason


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_requests_in_flight_are_answered_and_new_ones_sent_away(
    start: Callable[..., ServerProcess], raw: bytes
) -> None:
    server = start(max_batch_requests=1)
    (worker,) = server.worker_pids()
    with server.frozen_worker():
        calls = busy(server, raw)
        signalled(server)
        assert reason_of(lambda: server.call(raw)) == ("UNAVAILABLE", "DRAINING")
        assert server.process.poll() is None
    assert all(call.result() for call in calls)
    assert server.process.wait(10) == 0
    assert has_ended(worker)


def test_an_idle_server_stops_at_once_on_ctrl_c(start: Callable[..., ServerProcess]) -> None:
    server = start()
    (worker,) = server.worker_pids()
    started = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < 5
    assert has_ended(worker)


@pytest.mark.parametrize("hurry", ["the grace is over", "a second signal"])
def test_what_does_not_finish_in_time_is_given_up(
    start: Callable[..., ServerProcess], raw: bytes, hurry: str
) -> None:
    server = start(drain_grace_seconds=1.0 if hurry == "the grace is over" else 60.0)
    (worker,) = server.worker_pids()
    with server.frozen_worker():
        calls = busy(server, raw)
        signalled(server)
        if hurry == "a second signal":
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 1
        endings = {reason_of(call.result)[0] for call in calls}
        assert endings <= {"UNAVAILABLE", "CANCELLED"}
        eventually(lambda: has_ended(worker), seconds=5)
    records = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    reasons = {record["reason"] for record in records if record.get("method") == "Attend"}
    assert reasons == {"DRAINING"}, "nobody's client has gone"

"""Workers killed under the load of real clients: what is in them fails at once, nothing else does."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import torch

from service.client import AttentionClient, BlockIndices
from service.pb.fsa.v1 import attention_pb2
from tests.serving import START_SECONDS, ServerProcess, eventually, refusal_of, request_of, running_server

MakeCase = Callable[..., Any]

KILLS = 20
CLIENTS = 6
LOST = ("UNAVAILABLE", "WORKER_LOST")
NO_WORKER = ("UNAVAILABLE", "NO_WORKER")


class Load:
    """Clients that send one request after the other and write down how each ended, and when."""

    def __init__(self, server: ServerProcess, raw: bytes) -> None:
        self.endings: Counter[tuple[str, str]] = Counter()
        self.lost_at: list[float] = []
        self.num_wrong = 0
        self._server = server
        self._raw = raw
        self._expected = attention_pb2.AttendResponse.FromString(server.call(raw)).out
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a call never ended"

    def wait_for_more(self, ending: tuple[str, str], count: int, *, seconds: float = 30.0) -> None:
        wanted = self.endings[ending] + count
        eventually(lambda: self.endings[ending] >= wanted, seconds=seconds, what=str(ending))

    def _send(self) -> None:
        while not self._stopping.is_set():
            try:
                answer = attention_pb2.AttendResponse.FromString(self._server.call(self._raw))
            except grpc.RpcError as error:
                refusal = refusal_of(error)
                self._note((refusal.code, refusal.reason))
                self._stopping.wait(0.05)
            else:
                self._note(("OK", ""), wrong=answer.out != self._expected)

    def _note(self, ending: tuple[str, str], *, wrong: bool = False) -> None:
        with self._lock:
            self.endings[ending] += 1
            self.num_wrong += wrong
            if ending == LOST:
                self.lost_at.append(time.monotonic())


def kill_full_worker(server: ServerProcess) -> float:
    """SIGKILL for the only child, in the middle of a batch or two; returns when."""
    (pid,) = server.worker_pids()
    # A GPU is done with a request before the next ones are there: it would mostly die with nothing to lose.
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: server.metrics()["fsa_queue_depth",] > 0, what="requests queue up")
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def test_a_worker_killed_again_and_again_costs_only_what_was_in_it(
    tmp_path: Path, make_case: MakeCase, device: torch.device
) -> None:
    # Restarts at once, however short the worker's life was; one request a batch, so that some queue.
    settings = {"worker_healthy_seconds": 0, "max_batch_requests": 1, "devices": device.type}
    with running_server(tmp_path / "log", **settings) as server:
        server.wait_for_health()
        raw = request_of(make_case(q_lens=(600,), dtype=torch.float16)).SerializeToString()
        slowest_loss_seconds, descriptors = 0.0, []
        with Load(server, raw) as load:
            for kill in range(1, KILLS + 1):
                load.wait_for_more(("OK", ""), CLIENTS)
                num_lost = len(load.lost_at)
                killed_at = kill_full_worker(server)
                server.wait_for_health("NOT_SERVING", seconds=1.0)
                load.wait_for_more(LOST, num_lost + 1 - len(load.lost_at), seconds=1.0)
                server.wait_for_health("SERVING")
                assert len(load.lost_at) - num_lost <= 2, "a worker holds two batches at most"
                slowest_loss_seconds = max(slowest_loss_seconds, load.lost_at[-1] - killed_at)
                descriptors.append(server.num_descriptors())
                assert server.metrics()["fsa_worker_restarts_total", "killed"] == kill
        assert slowest_loss_seconds < 1.0
        assert load.num_wrong == 0
        assert set(load.endings) <= {("OK", ""), LOST, NO_WORKER}, "what was queued was answered"
        assert max(descriptors[-5:]) <= min(descriptors[:5]) + 2, descriptors
        # An answer is in flight until the server has heard that it was sent.
        eventually(lambda: server.metrics()["fsa_inflight_bytes", "host"] == 0)
        assert server.metrics()["fsa_queue_depth",] == 0
        (worker,) = server.worker_pids()
        server.process.kill()
        eventually(lambda: not Path(f"/proc/{worker}").exists(), what="the worker goes with its server")


def test_a_hung_worker_is_replaced_and_a_client_that_sends_again_is_answered(
    tmp_path: Path, make_case: MakeCase, device: torch.device
) -> None:
    settings = {"batch_timeout_seconds": 2, "worker_healthy_seconds": 0, "devices": device.type}
    case = make_case(q_lens=(100,), dtype=torch.float16)
    q, k, v, indices = (x.cpu() for x in (case.q, case.k, case.v, case.block_indices))
    pattern = BlockIndices(indices, block_size=case.problem.block_size)
    with running_server(tmp_path / "log", **settings) as server, AttentionClient(server.target) as client:
        server.wait_for_health()
        expected = client.attend(q, k, v, pattern)
        (pid,) = server.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        # Two seconds in the one that hangs, and those that another takes to start.
        answer = client.attend(q, k, v, pattern, timeout_seconds=START_SECONDS)
        assert torch.equal(answer.out, expected.out)
        assert server.metrics()["fsa_worker_restarts_total", "hang"] == 1
        assert server.worker_pids() != [pid]

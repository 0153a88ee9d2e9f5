"""Answers on their way to clients that read slowly, and messages that grow when they are unpacked."""

import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from service.client import AttentionClient, Dense, ResourceExhausted
from tests.serving import ServerProcess, eventually, running_server

MIB = 1 << 20
ANSWER_BYTES = 32 * MIB


class Gate:
    """Lets bytes to a server pass, and those from it when it is open."""

    def __init__(self, port: int) -> None:
        self.open = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = port
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            one.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        self._sockets += (client, server)
        threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
        self._pass(server, client, self.open)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, gate: threading.Event | None) -> None:
        num_bytes = 0
        try:
            while data := source.recv(1 << 16):
                num_bytes += len(data)
                # What sets a connection up passes.
                if gate is not None and num_bytes > MIB:
                    gate.wait()
                sink.sendall(data)
        except OSError:
            pass


@contextmanager
def read_slowly(server: ServerProcess, answers: list[object]) -> Iterator[Gate]:
    """A client that has a call, and does not read on in its answer until the gate is open."""
    num_tokens = ANSWER_BYTES // 512
    q = np.ones((num_tokens, 1, 16), np.float16)
    k, v = np.ones((1, 1, 16), np.float16), np.ones((1, 1, 256), np.float16)

    def call() -> None:
        with AttentionClient(gate.target, retry=False) as client:
            try:
                answers.append(client.attend(q, k, v, Dense(), causal=False, timeout_seconds=60).out.shape)
            except Exception as error:
                answers.append(error)

    with closing(Gate(server.port)) as gate:
        thread = threading.Thread(target=call)
        thread.start()
        yield gate
        gate.open.set()
        thread.join(60)


def inflight_bytes(server: ServerProcess) -> float:
    return server.metrics()["fsa_inflight_bytes", "host"]


def test_an_answer_is_in_flight_until_it_is_read(tmp_path: Path, device: torch.device) -> None:
    answers: list[object] = []
    with running_server(tmp_path / "log", devices=device.type) as server:
        server.wait_for_health()
        with read_slowly(server, answers) as gate:
            eventually(lambda: server.metrics().get(("fsa_requests_total", "OK", "Attend")), what="an answer")
            assert ANSWER_BYTES <= inflight_bytes(server) < ANSWER_BYTES + MIB
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.health() == "NOT_SERVING")
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(2)
            gate.open.set()
            assert server.process.wait(30) == 0
    assert answers == [(ANSWER_BYTES // 512, 1, 256)]


def test_budgets_know_of_answers_that_are_not_read(tmp_path: Path, device: torch.device) -> None:
    answers: list[object] = []
    with running_server(tmp_path / "log", devices=device.type, max_inflight_requests=1) as server:
        server.wait_for_health()
        with read_slowly(server, answers):
            eventually(lambda: server.metrics().get(("fsa_requests_total", "OK", "Attend")), what="an answer")
            x = np.ones((1, 1, 16), np.float32)
            with (
                AttentionClient(server.target, retry=False) as client,
                pytest.raises(ResourceExhausted, match="max_inflight_requests"),
            ):
                client.attend(x, x, x, Dense())
        eventually(lambda: inflight_bytes(server) == 0)
    assert len(answers) == 1


def test_a_compressed_message_is_refused_before_it_is_unpacked(tmp_path: Path, device: torch.device) -> None:
    def peak_bytes() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    with running_server(tmp_path / "log", devices=device.type, max_message_bytes=16 * MIB) as server:
        server.wait_for_health()
        before = peak_bytes()
        with pytest.raises(grpc.RpcError) as caught:
            server.call(bytes(256 * MIB), compression=grpc.Compression.Gzip)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert peak_bytes() - before < 64 * MIB

"""The worker process by itself, at the other end of a bare control socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service import channel
from service.arena import ArenaPool
from service.channel import Channel
from service.devices import DeviceInfo
from service.executor import CpuExecutor
from service.records import AddSegment, Done, DropSegment, Memory, Ready, Record, Stop, Submit
from service.worker import ORPHANED_EXIT_CODE, PROTOCOL_EXIT_CODE, serve
from tests.jobs import SELECTED, Request

READY = channel.encode(Ready(DeviceInfo("cpu", 0, "", 0, "", "", ""), Memory(0, 0)))


@pytest.fixture
def pool() -> ArenaPool:
    return ArenaPool(1 << 20, segment_bytes=1 << 18, initial_bytes=1 << 18)


class FrontEnd:
    """Sends records as the front end does, but waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.channel = Channel(sock)

    def add_segments(self, pool: ArenaPool) -> None:
        for number, segment in pool.segments().items():
            record = channel.encode(AddSegment(number, segment.num_bytes))
            socket.send_fds(self.socket, [b"\1" + record], [segment.fd])

    def receive(self) -> Record:
        return self.channel.receive()[0]


@pytest.fixture
def ends() -> Iterator[tuple[FrontEnd, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(60)
        yield FrontEnd(ours), theirs


def spawn(theirs: socket.socket, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.worker", f"--control-fd={theirs.fileno()}", "--device=cpu"]
    return subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)


def test_a_worker_says_ready_works_and_stops_with_0(
    ends: tuple[FrontEnd, socket.socket], pool: ArenaPool
) -> None:
    front_end, theirs = ends
    request = Request.write(pool, SELECTED, 1)
    with spawn(theirs) as process:
        assert isinstance(front_end.receive(), Ready)
        front_end.add_segments(pool)
        front_end.channel.send(Submit(7, (request.job,)))
        # Taken after the batch, which has to be finished first.
        front_end.channel.send(Stop())
        done = front_end.receive()
        assert isinstance(done, Done)
        assert done.batch == 7
        assert process.wait(30) == 0
    assert request.is_answered()


def test_rubbish_ends_the_worker_with_a_clear_line(ends: tuple[FrontEnd, socket.socket]) -> None:
    front_end, theirs = ends
    with spawn(theirs) as process:
        front_end.socket.send(b"\1\x63rubbish")
        log = process.communicate(timeout=30)[1]
        assert process.returncode == PROTOCOL_EXIT_CODE
    line = json.loads(log.splitlines()[-1])
    assert line["level"] == "critical"
    assert "no record" in line["message"]


def test_a_worker_ends_with_its_front_end_even_when_it_is_busy(tmp_path: Path) -> None:
    """The front end is killed while the worker, stopped, cannot hear the end of the socket."""
    front_end = """
import socket, subprocess, sys, time
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
command = [sys.executable, "-m", "service.worker", f"--control-fd={theirs.fileno()}", "--device=cpu"]
worker = subprocess.Popen(command, pass_fds=[theirs.fileno()])
ours.recv(4096)
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", front_end], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        os.kill(worker, signal.SIGSTOP)
        process.kill()
    deadline = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    """A zombie, left to whoever adopted it, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_the_socket_ends_a_worker(ends: tuple[FrontEnd, socket.socket]) -> None:
    front_end, theirs = ends
    with spawn(theirs) as process:
        theirs.close()
        assert isinstance(front_end.receive(), Ready)
        front_end.socket.close()
        assert process.wait(30) == ORPHANED_EXIT_CODE


@pytest.mark.parametrize("wrong", ["unknown_segment", "outside", "dropped", "not_for_a_worker"])
def test_what_the_arena_does_not_hold_is_never_run(
    ends: tuple[FrontEnd, socket.socket], pool: ArenaPool, wrong: str
) -> None:
    front_end, theirs = ends
    job = Request.write(pool, SELECTED, 1).job
    worker = Channel(theirs)
    refused: list[BaseException] = []

    def work() -> None:
        try:
            serve(worker, CpuExecutor(0, "auto", worker.send))
        except channel.ProtocolError as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    front_end.add_segments(pool)
    if wrong == "dropped":
        front_end.channel.send(DropSegment(job.memory.segment))
    if wrong == "unknown_segment":
        job = replace(job, memory=replace(job.memory, segment=5))
    if wrong == "outside":
        job = replace(job, memory=replace(job.memory, offset=pool.segment_bytes))
    if wrong == "not_for_a_worker":
        front_end.channel.send(Done(0, 0.0, 0.0, 0.0))
    front_end.channel.send(Submit(1, (job,)))
    thread.join(30)
    assert len(refused) == 1
    theirs.close()
    with pytest.raises(EOFError):
        front_end.receive()

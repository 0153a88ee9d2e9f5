"""Closed-loop load: so many requests in flight, the next one sent as soon as one is answered.

Python spends as much time on a large message as the server's front end does, so the load comes from
several processes. They start together, and every answer or failure is reported as it comes.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np
from numpy.typing import NDArray

from service.bench.workload import Shape, make_request
from service.client import AsyncAttentionClient, AttentionError, Timings
from service.signals import blocked_in_children, die_with_parent

_POOL_REQUESTS = 4
_POOL_BYTES = 256 << 20
_COMPARE_EVERY = 16
# What a lane waits after a failure, so that a server that refuses at once is not flooded.
_PAUSE_SECONDS = 0.05
_JOIN_SECONDS = 5


class LoadFailed(Exception):
    """The load could not be made; the server's failures are samples instead."""


@dataclass(frozen=True, slots=True)
class Load:
    """``concurrency`` requests in flight for ``seconds``, or until ``requests`` were sent if that is set."""

    target: str
    shape: Shape
    concurrency: int
    seconds: float
    requests: int | None
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it ended, how long it took the client, and the server's timings or a reason."""

    ended_seconds: float
    latency_seconds: float
    timings: Timings | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A process is connected and warm; with ``problem``, it is not and never will be."""

    problem: str = ""


def run_load(
    load: Load, num_processes: int, on_sample: Callable[[int, float], None]
) -> tuple[list[Sample], float]:
    """Makes the load; returns its samples and the seconds from the common start to the last answer.

    ``on_sample(count, elapsed_seconds)`` is called for each. Raises LoadFailed. Main thread only.
    """
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        # The first process would start it, and it unblocks the signal (CPython 3.11, 3.12).
        resource_tracker.ensure_running()
        with _ctrl_c_waits(), blocked_in_children(signal.SIGINT):
            for lanes, quota in _shares(load, min(num_processes, load.concurrency)):
                process, pipe = _start(load, lanes, quota)
                processes.append(process)
                pipes.append(pipe)
        for pipe in pipes:
            _await_ready(pipe)
        start = time.monotonic()
        for pipe in pipes:
            pipe.send(start)
        samples = list(_collect(pipes, start, on_sample))
        for process in processes:
            process.join(_JOIN_SECONDS)
        if any(process.exitcode != 0 for process in processes):
            raise LoadFailed("a process of the load generator ended early")
        return samples, max((sample.ended_seconds for sample in samples), default=start) - start
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _shares(load: Load, num_processes: int) -> Iterator[tuple[int, int | None]]:
    """Each process's part of the concurrency and, where they are counted, of the requests."""

    def share(total: int, index: int) -> int:
        return total // num_processes + (index < total % num_processes)

    for index in range(num_processes):
        yield share(load.concurrency, index), None if load.requests is None else share(load.requests, index)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """A process that is left half started would say so in a traceback."""
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _start(load: Load, lanes: int, quota: int | None) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_process, args=(load, lanes, quota, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _await_ready(pipe: Connection) -> None:
    try:
        message: _Ready = pipe.recv()
    except EOFError as error:
        raise LoadFailed("a process of the load generator did not start") from error
    if message.problem:
        raise LoadFailed(message.problem)


def _collect(
    pipes: list[Connection], start: float, on_sample: Callable[[int, float], None]
) -> Iterator[Sample]:
    count = 0
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                sample: Sample = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                continue
            count += 1
            on_sample(count, time.monotonic() - start)
            yield sample


def _run_process(load: Load, lanes: int, quota: int | None, pipe: Connection) -> None:
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        return  # it had died before
    asyncio.run(_Process(load, quota, pipe).run(lanes))


class _Process:
    """One process of the load: its share of the lanes over one connection."""

    def __init__(self, load: Load, quota: int | None, pipe: Connection) -> None:
        self._load = load
        self._quota = quota
        self._pipe = pipe
        pool = min(_POOL_REQUESTS, max(1, _POOL_BYTES // load.shape.tensor_bytes))
        self._requests = [make_request(load.shape, seed) for seed in range(pool)]
        self._answers: list[NDArray[np.generic]] = []
        self._sent = 0
        self._end_seconds = 0.0

    async def run(self, lanes: int) -> None:
        # Without retries: a benchmark counts what a client would have had to send again.
        timeout = self._load.timeout_seconds
        async with AsyncAttentionClient(self._load.target, timeout_seconds=timeout, retry=False) as client:
            try:
                for request in self._requests:
                    answer = await client.attend(request.q, request.k, request.v, request.pattern)
                    self._answers.append(answer.out)
            except AttentionError as error:
                self._pipe.send(_Ready(f"a first request failed: {error}"))
                return
            self._pipe.send(_Ready())
            self._end_seconds = self._pipe.recv() + self._load.seconds
            await asyncio.gather(*(self._lane(client) for _ in range(lanes)))

    async def _lane(self, client: AsyncAttentionClient) -> None:
        while (number := self._next()) is not None:
            sample = await self._send(client, number)
            self._pipe.send(sample)
            if sample.failure:
                await asyncio.sleep(_PAUSE_SECONDS)

    def _next(self) -> int | None:
        """The number of the next request to send, unless there is none."""
        done = time.monotonic() >= self._end_seconds if self._quota is None else self._sent >= self._quota
        if done:
            return None
        self._sent += 1
        return self._sent - 1

    async def _send(self, client: AsyncAttentionClient, number: int) -> Sample:
        index = number % len(self._requests)
        request = self._requests[index]
        start = time.monotonic()
        try:
            answer = await client.attend(request.q, request.k, request.v, request.pattern)
        except AttentionError as error:
            end = time.monotonic()
            return Sample(end, end - start, None, error.reason or error.code.name)
        end = time.monotonic()
        # Company in a batch must not change a bit of the answer.
        if number % _COMPARE_EVERY == 0 and not _same_bits(answer.out, self._answers[index]):
            return Sample(end, end - start, None, "WRONG_ANSWER")
        return Sample(end, end - start, answer.timings)


def _same_bits(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))

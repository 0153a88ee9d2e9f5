"""One worker process: its start, the batches it has, its end."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from fsa_core import tuning_table
from service.arena import ArenaPool
from service.channel import AsyncChannel, socket_pair
from service.child_process import ChildProcess
from service.devices import DeviceInfo, DeviceSpec
from service.job import Job, JobResult
from service.records import (
    AddSegment,
    Done,
    DropSegment,
    Failed,
    FailureKind,
    Memory,
    ProtocolError,
    Ready,
    Record,
    Stop,
    Submit,
)

log = logging.getLogger("fsa.worker_client")

MAX_OUTSTANDING_BATCHES = 2
ROOT = Path(__file__).resolve().parents[1]
# How long a killed process is waited for before its batches fail all the same.
REAP_SECONDS = 0.5
# So many times as long as one request a batch of several may take: more, and what hangs is found too late.
MOST_TIMEOUTS = 4
# How long one that closed its end of the channel may take to exit by itself.
LEAVE_SECONDS = 2.0
# How long an idle worker may take to exit when told to.
EXIT_SECONDS = 5.0


class WorkerLost(Exception):
    """The worker died, or was not there, with the batch undone: safe to retry."""


class WorkerFailed(Exception):
    """The batch failed and the worker lives. ``kind`` is "error" or "oom"; the text is for logs only."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker is started and when it counts as hung; see WorkerClient."""

    backend: str
    num_threads: int
    log_level: str
    log_format: str
    start_timeout_seconds: float
    batch_timeout_seconds: float
    tuning_file: str | None

    def command(self, spec: DeviceSpec, control_fd: int) -> list[str]:
        arguments = {
            "control-fd": control_fd,
            "device": spec.label,
            "backend": self.backend,
            "num-threads": self.num_threads,
            "log-level": self.log_level,
            "log-format": self.log_format,
        }
        # No modules of the folder that it runs in, as with "-m", and of this project those that run here.
        start = (
            f"import sys; root = {str(ROOT)!r}; root in sys.path or sys.path.insert(0, root); "
            "from service.worker import main; sys.exit(main())"
        )
        return [
            sys.executable,
            "-P",
            "-c",
            start,
            *(f"--{name}={value}" for name, value in arguments.items()),
        ]


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """A batch that the worker has, and how many requests ride in it."""

    future: "asyncio.Future[JobResult]"
    num_jobs: int


class WorkerProcess:
    """One process, from its start until it is reaped; never started again."""

    def __init__(
        self, spec: DeviceSpec, arena: ArenaPool, options: WorkerOptions, on_change: Callable[[], None]
    ) -> None:
        self.pid: int | None = None
        self.device: DeviceInfo | None = None
        self.ready_at: float | None = None
        self.memory = Memory(0, 0)
        self._spec = spec
        self._arena = arena
        self._options = options
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._outstanding: dict[int, _Outstanding] = {}
        self._batches = count()
        self._sent_segments: set[int] = set()
        self._sent_generation = -1
        # Resolved when it has to go or is gone, with the cause; None: its exit status will say.
        self._end: asyncio.Future[str | None] = self._loop.create_future()
        self._idle: asyncio.Future[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        return self.ready_at is not None and not self._end.done()

    @property
    def free_slots(self) -> int:
        return MAX_OUTSTANDING_BATCHES - len(self._outstanding) if self.ready else 0

    def submit(self, jobs: Sequence[Job]) -> "asyncio.Future[JobResult]":
        batch = next(self._batches)
        self.send_segments()
        self._channel.send(Submit(batch, tuple(jobs)))
        outstanding = self._outstanding[batch] = _Outstanding(self._loop.create_future(), len(jobs))
        if len(self._outstanding) == 1:
            self._watch_first()
        return outstanding.future

    def send_segments(self) -> None:
        """Tell the worker which segments the arena gained and lost since the last time.

        Raises:
            OSError: no descriptor is left to send one by.
        """
        if self._arena.generation == self._sent_generation or self._end.done():
            return
        generation = self._arena.generation
        segments = self._arena.segments()
        for number in self._sent_segments - segments.keys():
            self._channel.send(DropSegment(number))
            self._sent_segments.remove(number)
        for number in sorted(segments.keys() - self._sent_segments):
            # Where this process is out of descriptors it raises, and the segment is sent the next time.
            self._channel.send(AddSegment(number, segments[number].num_bytes), segments[number].fd)
            self._sent_segments.add(number)
        self._sent_generation = generation

    async def run(self, stopping: "asyncio.Future[float]") -> str:
        """Start it, and return when it is gone and every batch is settled.

        The result is the cause: "killed" by a signal, "exit", "start_timeout", "hang", "fatal_error" (of the
        device) or "protocol". ``stopping``, once it has the grace in seconds, ends it in good order.

        Raises:
            OSError: the process could not be started.
        """
        child = self._spawn()
        self._watch(self._options.start_timeout_seconds, "start_timeout")
        try:
            await _any_of(child.exited, self._end, stopping)
            if stopping.done():
                await self._drain(child, stopping.result())
            return await self._bury(child)
        except asyncio.CancelledError:
            # The loop is shutting down without stop().
            child.kill()
            self._channel.close()
            raise

    def _spawn(self) -> ChildProcess:
        ours, theirs = socket_pair()
        # OpenMP's threads spin while they wait, by default: on the CPU they take the cores from the front end
        # and from one another (a decoding step of 7 ms took 80 on two busy cores).
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        if self._spec.uuid:
            environment["CUDA_VISIBLE_DEVICES"] = self._spec.uuid
        if self._options.tuning_file:
            environment[tuning_table.ENVIRONMENT_VARIABLE] = self._options.tuning_file
        with theirs:
            try:
                command = self._options.command(self._spec, theirs.fileno())
                child = ChildProcess(command, pass_fds=[theirs.fileno()], env=environment)
            except OSError:
                ours.close()
                raise
        self.pid = child.pid
        self._channel = AsyncChannel(ours, self._receive, self._lost)
        try:
            self.send_segments()
        except OSError:
            child.kill()
            self._channel.close()
            raise
        log.info("worker started", extra={"device": self._spec.label, "pid": self.pid})
        return child

    async def _drain(self, child: ChildProcess, grace_seconds: float) -> None:
        """Let it finish what it has, then tell it to exit; return when it did or time is up."""
        if self._outstanding:
            self._idle = self._loop.create_future()
            await _any_of(self._idle, self._end, child.exited, timeout_seconds=grace_seconds)
        if not self._outstanding and self.ready:
            self._channel.send(Stop())
            await asyncio.wait({child.exited}, timeout=EXIT_SECONDS)

    async def _bury(self, child: ChildProcess) -> str:
        if self._end.done() and self._end.result() is None:
            # It closed its end: on its way out by itself, most likely, and its status says how.
            await asyncio.wait({child.exited}, timeout=LEAVE_SECONDS)
        self._finish(None)
        child.kill()
        # Its GPU may still be copying into the arena, and slices whose batch has failed are used again.
        await asyncio.wait({child.exited}, timeout=REAP_SECONDS)
        self._channel.close()
        self._watch(None, "hang")
        for outstanding in self._outstanding.values():
            if not outstanding.future.done():
                outstanding.future.set_exception(WorkerLost(f"the worker on {self._spec.label} was lost"))
        self._outstanding.clear()
        self._on_change()
        status = await child.exited
        return self._end.result() or ("killed" if status < 0 else "exit")

    def _finish(self, cause: str | None) -> None:
        """It has to go: nothing is submitted any more, and ``run`` buries it."""
        if not self._end.done():
            self._end.set_result(cause)
            self._on_change()

    def _lost(self, error: Exception) -> None:
        if not isinstance(error, EOFError):
            log.error("the worker sent what is no record", extra={"device": self._spec.label}, exc_info=error)
        self._finish(None if isinstance(error, EOFError) else "protocol")

    def _receive(self, record: Record) -> None:
        match record:
            case Done():
                result = JobResult(record.h2d_seconds, record.kernel_seconds, record.d2h_seconds)
                self._settle(record.batch, result)
            case Failed(kind=FailureKind.FATAL):
                log.error("the device failed", extra={"device": self._spec.label, "detail": record.message})
                self._finish("fatal_error")
            case Failed():
                self._settle(record.batch, WorkerFailed(record.kind.name.lower(), record.message))
            case Memory():
                self.memory = record
            case Ready() if self.device is None:
                self.device, self.memory, self.ready_at = record.device, record.memory, self._loop.time()
                self._watch(None, "hang")
                self._on_change()
            case _:
                self._lost(ProtocolError(f"{type(record).__name__} was not expected"))

    def _settle(self, batch: int, result: JobResult | WorkerFailed) -> None:
        outstanding = self._outstanding.pop(batch, None)
        if outstanding is None:
            self._lost(ProtocolError(f"batch {batch} is not outstanding"))
            return
        future = outstanding.future
        if not future.done():
            if isinstance(result, WorkerFailed):
                future.set_exception(result)
            else:
                future.set_result(result)
        # The next one had to wait for this one, so its time starts now.
        self._watch_first()
        if self._idle is not None and not self._outstanding and not self._idle.done():
            self._idle.set_result(None)
        self._on_change()

    def _watch_first(self) -> None:
        """The batch in hand, if any: several requests may take longer than each of them alone."""
        first = next(iter(self._outstanding.values()), None)
        if first is None:
            self._watch(None, "hang")
        else:
            timeouts = min(first.num_jobs, MOST_TIMEOUTS)
            self._watch(timeouts * self._options.batch_timeout_seconds, "hang")

    def _watch(self, seconds: float | None, cause: str) -> None:
        """End the process for ``cause`` unless the next call comes within ``seconds`` (None: never)."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = None
        if seconds is not None:
            # What is logged then is of no request, such as the one that arms it.
            self._watchdog = self._loop.call_later(seconds, self._finish, cause, context=Context())


async def _any_of(*futures: "asyncio.Future[Any]", timeout_seconds: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)

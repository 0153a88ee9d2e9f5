"""Supervisor of one worker process: start it, feed it batches, notice its death, start another."""

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from service.arena import ArenaPool
from service.channel import (
    AddSegment,
    AsyncChannel,
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
    socket_pair,
)
from service.devices import DeviceInfo, DeviceSpec
from service.job import Job, JobResult

log = logging.getLogger("fsa.worker_client")

MAX_OUTSTANDING_BATCHES = 2
FIRST_BACK_OFF_SECONDS = 0.2
MAX_BACK_OFF_SECONDS = 10.0
# How long a killed process is waited for before its batches fail all the same.
REAP_SECONDS = 0.5
# How long an idle worker may take to exit when told to.
EXIT_SECONDS = 5.0
_STDERR = 2


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

    def command(self, spec: DeviceSpec, control_fd: int) -> list[str]:
        arguments = {
            "control-fd": control_fd,
            "device": spec.label,
            "backend": self.backend,
            "num-threads": self.num_threads,
            "log-level": self.log_level,
            "log-format": self.log_format,
        }
        return [
            sys.executable,
            "-m",
            "service.worker",
            *(f"--{name}={value}" for name, value in arguments.items()),
        ]


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
        self._outstanding: dict[int, asyncio.Future[JobResult]] = {}
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
        future = self._outstanding[batch] = self._loop.create_future()
        if len(self._outstanding) == 1:
            self._watch(self._options.batch_timeout_seconds, "hang")
        return future

    def send_segments(self) -> None:
        """Tell the worker which segments the arena gained and lost since the last time."""
        if self._arena.generation == self._sent_generation or self._end.done():
            return
        self._sent_generation = self._arena.generation
        segments = self._arena.segments()
        for number in self._sent_segments - segments.keys():
            self._channel.send(DropSegment(number))
        for number in sorted(segments.keys() - self._sent_segments):
            self._channel.send(AddSegment(number, segments[number].num_bytes), segments[number].fd)
        self._sent_segments = set(segments)

    async def run(self, stopping: "asyncio.Future[float]") -> str:
        """Start it, and return when it is gone and every batch is settled.

        The result is the cause: "killed" by a signal, "exit", "start_timeout", "hang", "fatal_error" (of the
        device) or "protocol". ``stopping``, once it has the grace in seconds, ends it in good order.

        Raises:
            OSError: the process could not be started.
        """
        process = await self._spawn()
        exited = self._loop.create_task(process.wait())
        self._watch(self._options.start_timeout_seconds, "start_timeout")
        try:
            await _any_of(exited, self._end, stopping)
            if stopping.done():
                await self._drain(exited, stopping.result())
            return await self._bury(process, exited)
        except asyncio.CancelledError:
            # The loop is shutting down without stop().
            self._kill(process)
            self._channel.close()
            raise

    async def _spawn(self) -> asyncio.subprocess.Process:
        ours, theirs = socket_pair()
        environment = dict(os.environ)
        if self._spec.uuid:
            environment["CUDA_VISIBLE_DEVICES"] = self._spec.uuid
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._options.command(self._spec, theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    # Standard output belongs to the command that runs the server.
                    stdout=_STDERR,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
            except BaseException:
                ours.close()
                raise
        self.pid = process.pid
        self._channel = AsyncChannel(ours, self._receive, self._lost)
        self.send_segments()
        log.info("worker started", extra={"device": self._spec.label, "pid": self.pid})
        return process

    async def _drain(self, exited: "asyncio.Task[int]", grace_seconds: float) -> None:
        """Let it finish what it has, then tell it to exit; return when it did or time is up."""
        if self._outstanding:
            self._idle = self._loop.create_future()
            await _any_of(self._idle, self._end, exited, timeout_seconds=grace_seconds)
        if not self._outstanding and self.ready:
            self._channel.send(Stop())
            await asyncio.wait({exited}, timeout=EXIT_SECONDS)

    async def _bury(self, process: asyncio.subprocess.Process, exited: "asyncio.Task[int]") -> str:
        self._finish(None)
        self._kill(process)
        # Its GPU may still be copying into the arena, and slices whose batch has failed are used again.
        await asyncio.wait({exited}, timeout=REAP_SECONDS)
        self._channel.close()
        for future in self._outstanding.values():
            if not future.done():
                future.set_exception(WorkerLost(f"the worker on {self._spec.label} was lost"))
        self._outstanding.clear()
        self._on_change()
        status = await exited
        return self._end.result() or ("killed" if status < 0 else "exit")

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.kill()

    def _finish(self, cause: str | None) -> None:
        """It has to go: nothing is submitted any more, and ``run`` buries it."""
        if self._watchdog is not None:
            self._watchdog.cancel()
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
                self.device, self.ready_at = record.device, self._loop.time()
                self._watch(None, "hang")
                self._on_change()
            case _:
                self._lost(ProtocolError(f"{type(record).__name__} was not expected"))

    def _settle(self, batch: int, result: JobResult | WorkerFailed) -> None:
        future = self._outstanding.pop(batch, None)
        if future is None:
            self._lost(ProtocolError(f"batch {batch} is not outstanding"))
            return
        if not future.done():
            if isinstance(result, WorkerFailed):
                future.set_exception(result)
            else:
                future.set_result(result)
        # The next one had to wait for this one, so its time starts now.
        self._watch(self._options.batch_timeout_seconds if self._outstanding else None, "hang")
        if self._idle is not None and not self._outstanding and not self._idle.done():
            self._idle.set_result(None)
        self._on_change()

    def _watch(self, seconds: float | None, cause: str) -> None:
        """End the process for ``cause`` unless the next call comes within ``seconds`` (None: never)."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = None if seconds is None else self._loop.call_later(seconds, self._finish, cause)


async def _any_of(*futures: "asyncio.Future[Any]", timeout_seconds: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)


class WorkerClient:
    """The worker of one device, whichever process it is at the moment.

    All methods belong to the event loop that called ``start``.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        arena: ArenaPool,
        *,
        on_change: Callable[[], None] = lambda: None,
        backend: str = "auto",
        num_threads: int = 0,
        start_timeout_seconds: float = 120.0,
        batch_timeout_seconds: float = 120.0,
        healthy_seconds: float = 10.0,
        log_level: str = "info",
        log_format: str = "json",
    ) -> None:
        """``on_change`` is called from the event loop after ``ready`` or ``restarts`` changed or a batch ended.

        ``num_threads`` (CPU worker) 0 is one a core. A batch that takes longer than ``batch_timeout_seconds``
        gets its worker killed as hung. The back-off between restarts doubles from 0.2 s to 10 s, and starts
        again after a worker was ready for ``healthy_seconds``.
        """
        self.spec = spec
        self.on_change = on_change
        self.restarts: Counter[str] = Counter()
        self._arena = arena
        self._options = WorkerOptions(
            backend, num_threads, log_level, log_format, start_timeout_seconds, batch_timeout_seconds
        )
        self._healthy_seconds = healthy_seconds
        self._process: WorkerProcess | None = None
        self._device: DeviceInfo | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a worker is up and said so (its kernels may still be cold)."""
        return self._process is not None and self._process.ready and not self._stopping.done()

    @property
    def free_slots(self) -> int:
        """How many more batches may be submitted now; 0 unless ready."""
        return self._process.free_slots if self._process is not None and self.ready else 0

    @property
    def device(self) -> DeviceInfo | None:
        """What the worker said of its device, the last time one was ready."""
        return self._device

    @property
    def pid(self) -> int | None:
        """Of the current process, which may be starting or dying."""
        return self._process.pid if self._process is not None else None

    @property
    def memory_used_bytes(self) -> int:
        """Of the device, as last reported; 0 when no worker did."""
        return self._process.memory.used_bytes if self._process is not None else 0

    @property
    def memory_total_bytes(self) -> int:
        return self._process.memory.total_bytes if self._process is not None else 0

    async def start(self) -> None:
        """Start supervising. Returns at once; ``ready`` follows, announced by ``on_change``."""
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[float] = self._loop.create_future()
        self._changed = asyncio.Event()
        self._arena.add_listener(self._arena_changed)
        self._supervisor = self._loop.create_task(self._supervise())

    async def wait_ready(self) -> None:
        """Wait until ``ready``, however many starts that takes.

        Raises:
            WorkerLost: stopped meanwhile.
        """
        while not self.ready:
            if self._stopping.done():
                raise WorkerLost("the worker was stopped")
            self._changed.clear()
            await self._changed.wait()

    async def stop(self, grace_seconds: float) -> None:
        """Take no more batches, let outstanding ones finish for ``grace_seconds``, end and reap it."""
        if self._supervisor is None:
            return
        if not self._stopping.done():
            self._stopping.set_result(grace_seconds)
            self._announce()
        # A caller that is cancelled must not leave a process behind.
        await asyncio.shield(self._supervisor)

    def submit(self, jobs: Sequence[Job]) -> "asyncio.Future[JobResult]":
        """Send one batch of compatible jobs.

        The future fails with WorkerLost (at once where no worker is ready) or WorkerFailed. It resolves only
        when the worker can no longer write to the jobs' memory: release leases after it, and never cancel it.

        Raises:
            RuntimeError: the worker is ready but has no free slot.
            ValueError: the jobs are not compatible, none, or too many.
        """
        if self._process is None or not self.ready:
            lost: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
            lost.set_exception(WorkerLost(f"no worker is up on {self.spec.label}"))
            return lost
        if self.free_slots == 0:
            raise RuntimeError(f"{MAX_OUTSTANDING_BATCHES} batches are outstanding already")
        return self._process.submit(jobs)

    async def _supervise(self) -> None:
        back_off = FIRST_BACK_OFF_SECONDS
        try:
            while not self._stopping.done():
                process = self._process = WorkerProcess(self.spec, self._arena, self._options, self._announce)
                cause = await self._run(process)
                if self._stopping.done():
                    break
                self.restarts[cause] += 1
                self._announce()
                if self._was_healthy(process):
                    back_off = FIRST_BACK_OFF_SECONDS
                details = {"device": self.spec.label, "pid": process.pid, "cause": cause}
                log.warning("worker lost; starting another in %.1f s", back_off, extra=details)
                await asyncio.wait({self._stopping}, timeout=back_off)
                back_off = min(2 * back_off, MAX_BACK_OFF_SECONDS)
        finally:
            self._process = None
            self._arena.remove_listener(self._arena_changed)

    async def _run(self, process: WorkerProcess) -> str:
        try:
            return await process.run(self._stopping)
        except OSError:
            log.exception("the worker could not be started", extra={"device": self.spec.label})
            return "spawn_error"

    def _was_healthy(self, process: WorkerProcess) -> bool:
        return process.ready_at is not None and self._loop.time() - process.ready_at >= self._healthy_seconds

    def _announce(self) -> None:
        """Deferred, so that whoever listens may submit, and so that an error there is not ours."""
        if self._process is not None and self._process.device is not None:
            self._device = self._process.device
        self._changed.set()
        self._loop.call_soon(self.on_change)

    def _arena_changed(self) -> None:
        """From whichever thread allocated."""
        with suppress(RuntimeError):  # The loop is closed: there is no worker to tell.
            self._loop.call_soon_threadsafe(self._send_segments)

    def _send_segments(self) -> None:
        if self._process is not None and self._process.pid is not None:
            self._process.send_segments()

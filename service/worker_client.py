"""Supervisor of one device's worker: start it, feed it batches, notice its death, start another."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context

from service.arena import ArenaPool
from service.devices import DeviceInfo, DeviceSpec
from service.job import Job, JobResult
from service.worker_process import (
    MAX_OUTSTANDING_BATCHES,
    WorkerFailed,
    WorkerLost,
    WorkerOptions,
    WorkerProcess,
)

__all__ = ["WorkerClient", "WorkerFailed", "WorkerLost"]

log = logging.getLogger("fsa.worker_client")

FIRST_BACK_OFF_SECONDS = 0.2
MAX_BACK_OFF_SECONDS = 10.0


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
        tuning_file: str | None = None,
        healthy_seconds: float = 10.0,
        log_level: str = "info",
        log_format: str = "json",
    ) -> None:
        """``on_change`` runs in the event loop after ``ready`` or ``restarts`` changed, or a batch ended.

        ``num_threads`` (CPU worker) 0 is one a core. A batch that takes longer than ``batch_timeout_seconds``
        for each of its jobs gets its worker killed as hung. ``tuning_file``: as in service.config.Settings.
        The back-off between restarts doubles from 0.2 s to 10 s, and starts again after a worker was ready
        for ``healthy_seconds``.
        """
        self.spec = spec
        self.on_change = on_change
        self.restarts: Counter[str] = Counter()
        self._arena = arena
        self._options = WorkerOptions(
            backend,
            num_threads,
            log_level,
            log_format,
            start_timeout_seconds,
            batch_timeout_seconds,
            tuning_file,
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
        """Of the device, as last reported; 0 until a worker is ready."""
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
        # What is logged then is of no request, such as the one whose end this may be.
        self._loop.call_soon(self.on_change, context=Context())

    def _arena_changed(self) -> None:
        """From whichever thread allocated."""
        with suppress(RuntimeError):  # The loop is closed: there is no worker to tell.
            self._loop.call_soon_threadsafe(self._send_segments)

    def _send_segments(self) -> None:
        if self._process is not None and self._process.pid is not None:
            with suppress(
                OSError
            ):  # No descriptor is left: the next batch tries again, and fails if it must.
                self._process.send_segments()

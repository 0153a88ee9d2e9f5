"""Supervisor of one worker process: start it, feed it batches, notice its death, start another."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from service.arena import ArenaPool
from service.devices import DeviceInfo, DeviceSpec
from service.job import Job, JobResult

MAX_OUTSTANDING_BATCHES = 2


class WorkerLost(Exception):
    """The worker died, or was not there, with the batch undone: safe to retry."""


class WorkerFailed(Exception):
    """The batch failed and the worker lives. ``kind`` is "error" or "oom"; the text is for logs only."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class WorkerClient:
    """All methods belong to the event loop that called ``start``."""

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
    ) -> None:
        """``on_change`` is called in the event loop whenever ``ready``, ``free_slots`` or a counter changes.

        ``num_threads`` (CPU worker) 0 is one a core. A batch that takes longer than ``batch_timeout_seconds``
        gets its worker killed as hung. The back-off between restarts doubles from 0.2 s to 10 s and starts
        again after a worker was ready for ``healthy_seconds``.
        """
        self.spec = spec
        self.on_change = on_change
        self.device: DeviceInfo | None = None
        self.restarts: Counter[str] = Counter()
        self.memory_used_bytes = 0
        self.memory_total_bytes = 0

    @property
    def ready(self) -> bool:
        """Whether a worker is up and said so (kernels may still be cold)."""
        raise NotImplementedError

    @property
    def free_slots(self) -> int:
        """How many more batches may be submitted now; 0 unless ready."""
        raise NotImplementedError

    @property
    def pid(self) -> int | None:
        """Of the running process, for logs and fault tests."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start supervising; returns at once, ``ready`` follows through ``on_change``."""
        raise NotImplementedError

    async def wait_ready(self) -> None:
        """Wait until ``ready``, however many starts that takes."""
        raise NotImplementedError

    async def stop(self, grace_seconds: float) -> None:
        """Let outstanding batches finish for ``grace_seconds``, end the process, reap it."""
        raise NotImplementedError

    def submit(self, jobs: Sequence[Job]) -> asyncio.Future[JobResult]:
        """Send one batch of compatible jobs.

        The future fails with WorkerLost or WorkerFailed. It resolves only when the worker can no longer write
        to the jobs' memory, so release leases after it, and wait under ``asyncio.shield``: never cancel it.

        Raises:
            RuntimeError: no free slot.
        """
        raise NotImplementedError

"""One worker as the dispatcher sees it: up once it has answered a warm-up request, and how busy."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from service.batcher import Entry
from service.job import Job, JobResult
from service.tasks import settled
from service.worker_client import WorkerClient, WorkerLost

log = logging.getLogger("fsa.worker")

WARM_UP_RETRY_SECONDS = 1.0

RunJob = Callable[[Job], Awaitable[JobResult]]
WarmUp = Callable[[RunJob], Awaitable[None]]


class DeviceWorker:
    """A worker process, warmed up every time it has been started. Belongs to the event loop."""

    def __init__(self, client: WorkerClient, warm_up: WarmUp) -> None:
        """``warm_up`` is given a function that runs one job here, and raises when the answer is wrong."""
        self.client = client
        self.outstanding_tokens = 0
        self.on_change: Callable[[], None] = lambda: None
        self._warm_up = warm_up
        self._warm_pid: int | None = None
        self._warming: asyncio.Task[None] | None = None
        client.on_change = self._changed

    @property
    def label(self) -> str:
        return self.client.spec.label

    @property
    def is_up(self) -> bool:
        """Whether it takes requests: it runs, and this very process has answered its warm-up."""
        return self.client.ready and self._warm_pid == self.client.pid

    @property
    def has_room(self) -> bool:
        return self.is_up and self.client.free_slots > 0

    @property
    def restarts(self) -> Mapping[str, int]:
        return self.client.restarts

    @property
    def memory_used_bytes(self) -> int:
        return self.client.memory_used_bytes

    @property
    def memory_total_bytes(self) -> int:
        return self.client.memory_total_bytes

    def submit(self, batch: Sequence[Entry]) -> "asyncio.Future[JobResult]":
        """Runs the batch; the future is WorkerClient.submit's. Only while it ``has_room``."""
        num_tokens = sum(entry.num_tokens for entry in batch)
        running = self.client.submit([entry.job for entry in batch])
        self.outstanding_tokens += num_tokens
        running.add_done_callback(lambda _: self._done(num_tokens))
        return running

    async def start(self) -> None:
        await self.client.start()

    async def stop(self, grace_seconds: float) -> None:
        """Ends the process, after what it is busy with or ``grace_seconds``."""
        if self._warming is not None:
            self._warming.cancel()
        await self.client.stop(grace_seconds)

    def _done(self, num_tokens: int) -> None:
        self.outstanding_tokens -= num_tokens

    def _changed(self) -> None:
        if self.client.ready and not self.is_up and self._warming is None:
            self._warming = asyncio.get_running_loop().create_task(self._warm())
        self.on_change()

    async def _warm(self) -> None:
        try:
            while self.client.ready and not self.is_up:
                await self._warm_once()
        finally:
            self._warming = None
        self.on_change()

    async def _warm_once(self) -> None:
        pid = self.client.pid
        try:
            await self._warm_up(self._run)
        except WorkerLost:
            log.warning("worker lost during its warm-up", extra={"device": self.label})
        except Exception:
            log.exception("warm-up failed", extra={"device": self.label})
            await asyncio.sleep(WARM_UP_RETRY_SECONDS)
        else:
            self._warm_pid = pid

    async def _run(self, job: Job) -> JobResult:
        return await settled(self.client.submit([job]))

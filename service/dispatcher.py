"""Queue to workers: forms the next batch whenever a worker has room, and settles every request."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from service.batcher import Batcher, Entry
from service.device_worker import DeviceWorker
from service.errors import FsaError
from service.job import Job, JobResult
from service.metrics import Metrics
from service.tasks import settled
from service.worker_client import WorkerFailed, WorkerLost

log = logging.getLogger("fsa.dispatcher")

# About what a worker takes to come back.
RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's answer lies in its memory; this is the batch it rode in."""

    result: JobResult
    batch_requests: int
    batch_tokens: int


class Dispatcher:
    """Joins one batcher and the workers; belongs to their event loop.

    A batch is handed over as soon as a worker has room: one computes, one is copied in meanwhile, and
    the rest queues and forms the next. While no worker is up nothing new is taken, but what is queued
    stays (it was never started) until a worker is back, its deadline passes, or
    ``worker_wait_seconds`` are over.
    """

    def __init__(
        self,
        workers: Sequence[DeviceWorker],
        batcher: Batcher,
        metrics: Metrics,
        *,
        worker_wait_seconds: float,
        on_serving_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.workers = tuple(workers)
        self._batcher = batcher
        self._metrics = metrics
        self._worker_wait_seconds = worker_wait_seconds
        self._on_serving_change = on_serving_change
        self._queued: dict[Entry, asyncio.Future[Outcome]] = {}
        self._was_serving = False
        self._company_timer: asyncio.TimerHandle | None = None
        self._give_up_timer: asyncio.TimerHandle | None = None
        for worker in self.workers:
            worker.on_change = self._workers_changed

    @property
    def is_serving(self) -> bool:
        """Whether a worker is up."""
        return any(worker.is_up for worker in self.workers)

    @property
    def queue_depth(self) -> int:
        return len(self._queued)

    async def start(self) -> None:
        """Start every worker; they come up in the background."""
        await asyncio.gather(*(worker.start() for worker in self.workers))

    def drain(self) -> None:
        """No more requests will come: what is queued waits for a worker only, not for company."""
        self._batcher.expect_no_company()
        self._dispatch()

    async def stop(self, grace_seconds: float) -> None:
        """Refuse what is queued and end every worker, after what it is busy with or ``grace_seconds``."""
        self._fail_queued(FsaError("DRAINING", "the server is shutting down"))
        await asyncio.gather(*(worker.stop(grace_seconds) for worker in self.workers))
        for timer in (self._company_timer, self._give_up_timer):
            if timer is not None:
                timer.cancel()

    def require_worker(self) -> None:
        """Raises FsaError(NO_WORKER) while no worker is up."""
        if not self.is_serving:
            raise _no_worker()

    async def submit(self, job: Job, *, priority: int = 0, deadline: float | None = None) -> Outcome:
        """Queues ``job`` and waits for its answer; ``deadline`` is of time.monotonic.

        When this returns or raises, no worker uses the job's memory any more: a job that is cancelled or
        late while it is queued is never started, and one that was started is waited for.

        Raises FsaError: NO_WORKER, WORKER_LOST, DEADLINE_EXCEEDED, DEVICE_MEMORY_EXHAUSTED or INTERNAL.
        """
        self.require_worker()
        entry = Entry(job, priority, time.monotonic(), deadline)
        future = self._queued[entry] = asyncio.get_running_loop().create_future()
        self._batcher.add(entry)
        self._dispatch()
        return await settled(future, on_cancel=lambda: self._withdraw(entry))

    def _withdraw(self, entry: Entry) -> None:
        future = self._queued.pop(entry, None)
        if future is not None:
            entry.cancelled = True
            future.cancel()

    def _dispatch(self) -> None:
        now = time.monotonic()
        while (worker := self._least_loaded()) is not None:
            draw = self._batcher.next_batch(now)
            for entry in draw.expired:
                late = FsaError("DEADLINE_EXCEEDED", "the deadline passed before the request could start")
                self._queued.pop(entry).set_exception(late)
            if not draw.batch:
                break
            self._send(worker, draw.batch)
        self._wake_when_due(now)

    def _least_loaded(self) -> DeviceWorker | None:
        with_room = [worker for worker in self.workers if worker.has_room]
        return min(with_room, key=lambda worker: worker.outstanding_tokens, default=None)

    def _send(self, worker: DeviceWorker, batch: list[Entry]) -> None:
        num_tokens = sum(entry.num_tokens for entry in batch)
        futures = [self._queued.pop(entry) for entry in batch]
        self._metrics.observe_batch(len(batch), num_tokens)
        try:
            running = worker.submit(batch)
        except Exception as error:
            # It never reached the worker (too few file descriptors, say): nobody else would tell them.
            for future in futures:
                future.set_exception(error)
            return
        running.add_done_callback(lambda done: _settle(done, futures, num_tokens))

    def _wake_when_due(self, now: float) -> None:
        """A batch that still waits for company becomes due by time alone, so a timer has to look.

        What is logged then is of no request, such as the one that arms it; likewise below.
        """
        if self._company_timer is not None:
            self._company_timer.cancel()
            self._company_timer = None
        due_at = self._batcher.due_at()
        if due_at is not None and due_at > now and self._least_loaded() is not None:
            loop = asyncio.get_running_loop()
            self._company_timer = loop.call_later(due_at - now, self._dispatch, context=Context())

    def _workers_changed(self) -> None:
        if self.is_serving != self._was_serving:
            self._was_serving = self.is_serving
            self._limit_the_wait()
            self._on_serving_change(self.is_serving)
        self._dispatch()

    def _limit_the_wait(self) -> None:
        if self._give_up_timer is not None:
            self._give_up_timer.cancel()
            self._give_up_timer = None
        if not self.is_serving:
            self._give_up_timer = asyncio.get_running_loop().call_later(
                self._worker_wait_seconds, lambda: self._fail_queued(_no_worker()), context=Context()
            )

    def _fail_queued(self, error: FsaError) -> None:
        for entry in self._batcher.take_all():
            self._queued.pop(entry).set_exception(error)


def _settle(
    done: "asyncio.Future[JobResult]", futures: Sequence["asyncio.Future[Outcome]"], num_tokens: int
) -> None:
    """Answers every request of a batch that has ended."""
    error = done.exception()
    for future in futures:
        if error is None:
            future.set_result(Outcome(done.result(), len(futures), num_tokens))
        else:
            future.set_exception(_failure(error, len(futures)))


def _failure(error: BaseException, batch_requests: int) -> BaseException:
    if isinstance(error, WorkerLost):
        return FsaError(
            "WORKER_LOST",
            "the worker was lost with the request in it; it was not answered and is safe to retry",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )
    if isinstance(error, WorkerFailed) and error.kind == "oom":
        return FsaError(
            "DEVICE_MEMORY_EXHAUSTED",
            "the device has not enough memory for the request's batch",
            # Alone it had the whole device: waiting does not help.
            retry_after_seconds=RETRY_AFTER_SECONDS if batch_requests > 1 else None,
        )
    return error


def _no_worker() -> FsaError:
    return FsaError(
        "NO_WORKER",
        "no worker is up: the server is starting, or a worker is being started again",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )

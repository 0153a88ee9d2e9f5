"""Queue to a real worker process: batches, cancellation, deadlines, failures."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from service import telemetry
from service.arena import ArenaPool
from service.batcher import Batcher, BatchLimits, Draw
from service.device_worker import DeviceWorker, RunJob
from service.devices import discover
from service.dispatcher import Dispatcher, Outcome
from service.errors import FsaError
from service.job import Slice
from service.metrics import Metrics
from service.worker_client import WorkerClient, WorkerFailed
from tests.jobs import SELECTED, Request

LIMITS = BatchLimits(requests=8, tokens=100_000, num_bytes=1 << 30)


async def no_warm_up(run: RunJob) -> None:
    """The worker is taken as it is."""


@dataclass
class Line:
    """A dispatcher over one worker, in the loop of ``runner``."""

    runner: asyncio.Runner
    arena: ArenaPool
    worker: WorkerClient
    dispatcher: Dispatcher
    serving: asyncio.Event

    def request(self, seed: int = 0) -> Request:
        return Request.write(self.arena, SELECTED, seed)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        assert self.worker.pid is not None
        os.kill(self.worker.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.worker.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def line(device: torch.device) -> Iterator[Line]:
    arena = ArenaPool(16 << 20, segment_bytes=1 << 20)
    with asyncio.Runner() as runner:

        async def start() -> Line:
            worker = WorkerClient(discover(device.type)[0], arena, num_threads=1)
            workers = [DeviceWorker(worker, no_warm_up)]
            serving = asyncio.Event()
            dispatcher = Dispatcher(
                workers,
                Batcher(LIMITS),
                Metrics(),
                worker_wait_seconds=5.0,
                on_serving_change=lambda is_serving: serving.set() if is_serving else serving.clear(),
            )
            await dispatcher.start()
            await asyncio.wait_for(serving.wait(), 60)
            return Line(runner, arena, worker, dispatcher, serving)

        line = runner.run(start())
        yield line
        runner.run(line.dispatcher.stop(1.0))


def test_the_next_batch_forms_while_the_worker_is_busy(line: Line) -> None:
    requests = [line.request(seed) for seed in range(6)]

    async def scenario() -> list[Outcome]:
        with line.frozen():
            tasks = [asyncio.create_task(line.dispatcher.submit(request.job)) for request in requests]
            await asyncio.sleep(0.05)
            assert line.dispatcher.queue_depth == 4
        return await asyncio.gather(*tasks)

    outcomes = line.runner.run(scenario())
    # One computes, one is on its way, and the rest had time to gather.
    assert [outcome.batch_requests for outcome in outcomes] == [1, 1, 4, 4, 4, 4]
    assert all(request.is_answered(line.worker.spec.kind) for request in requests)


def test_a_queued_request_that_is_cancelled_is_never_started(line: Line) -> None:
    busy, cancelled = [line.request(seed) for seed in range(2)], line.request(9)

    async def scenario() -> None:
        with line.frozen():
            tasks = [asyncio.create_task(line.dispatcher.submit(request.job)) for request in busy]
            task = asyncio.create_task(line.dispatcher.submit(cancelled.job))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 0.5)
            assert line.dispatcher.queue_depth == 0
        await asyncio.gather(*tasks)

    line.runner.run(scenario())
    assert cancelled.tensor("out").isnan().all()


def test_a_running_request_that_is_cancelled_keeps_its_memory_until_the_worker_is_done(line: Line) -> None:
    request = line.request()

    async def scenario() -> None:
        with line.frozen():
            task = asyncio.create_task(line.dispatcher.submit(request.job))
            await asyncio.sleep(0.02)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.02)
                assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    line.runner.run(scenario())
    assert request.is_answered(line.worker.spec.kind)


def test_a_request_that_is_late_when_its_turn_comes_is_never_started(line: Line) -> None:
    busy, late = [line.request(seed) for seed in range(2)], line.request(9)

    async def scenario() -> None:
        with line.frozen():
            tasks = [asyncio.create_task(line.dispatcher.submit(request.job)) for request in busy]
            await asyncio.sleep(0)
            deadline = time.monotonic() + 0.05
            task = asyncio.create_task(line.dispatcher.submit(late.job, deadline=deadline))
            await asyncio.sleep(0.1)
        with pytest.raises(FsaError) as caught:
            await asyncio.wait_for(task, 5)
        assert caught.value.reason == "DEADLINE_EXCEEDED"
        await asyncio.gather(*tasks)

    line.runner.run(scenario())
    assert late.tensor("out").isnan().all()


def test_priority_decides_what_goes_first(line: Line) -> None:
    ended: list[str] = []

    async def submit(name: str, request: Request, priority: int) -> None:
        await line.dispatcher.submit(request.job, priority=priority)
        ended.append(name)

    async def scenario() -> None:
        with line.frozen():
            busy = [asyncio.create_task(submit("busy", line.request(seed), 0)) for seed in range(2)]
            await asyncio.sleep(0.02)
            low, high = line.request(2), line.request(3)
            # Of different kinds, so that they cannot share a batch.
            high = Request(replace(high.problem, softmax_scale=0.5), high.lease)
            late = [asyncio.create_task(submit(*each)) for each in (("low", low, 0), ("high", high, 1))]
            await asyncio.sleep(0.02)
        await asyncio.gather(*busy, *late)

    line.runner.run(scenario())
    assert ended == ["busy", "busy", "high", "low"]


def test_a_free_worker_waits_for_company_when_it_is_told_to(line: Line) -> None:
    (worker,) = line.dispatcher.workers
    usual = worker.on_change
    requests = [line.request(seed) for seed in range(2)]

    async def scenario() -> list[Outcome]:
        batcher = Batcher(replace(LIMITS, delay_seconds=0.2))
        patient = Dispatcher([worker], batcher, Metrics(), worker_wait_seconds=5.0)
        first = asyncio.create_task(patient.submit(requests[0].job))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(patient.submit(requests[1].job))
        return await asyncio.wait_for(asyncio.gather(first, second), 5)

    outcomes = line.runner.run(scenario())
    worker.on_change = usual
    assert [outcome.batch_requests for outcome in outcomes] == [2, 2]


@pytest.mark.parametrize("ends_by", ["deadline", "drain"])
def test_company_is_not_waited_for_to_the_deadline_nor_while_draining(line: Line, ends_by: str) -> None:
    (worker,) = line.dispatcher.workers
    usual = worker.on_change
    request = line.request(1)

    async def scenario() -> None:
        batcher = Batcher(replace(LIMITS, delay_seconds=60.0))
        patient = Dispatcher([worker], batcher, Metrics(), worker_wait_seconds=5.0)
        deadline = time.monotonic() + 2 if ends_by == "deadline" else None
        task = asyncio.create_task(patient.submit(request.job, deadline=deadline))
        await asyncio.sleep(0.05)
        assert patient.queue_depth == 1
        if ends_by == "drain":
            patient.drain()
        await asyncio.wait_for(task, 5)

    line.runner.run(scenario())
    worker.on_change = usual
    assert request.is_answered(line.worker.spec.kind)


class WatchedBatcher(Batcher):
    """Knows the ids of the requests in whose name it was asked for batches."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        self.asked_by: list[str] = []

    def next_batch(self, now: float) -> Draw:
        self.asked_by.append(telemetry.request_id())
        return super().next_batch(now)


def test_a_timer_works_for_no_request(line: Line) -> None:
    (worker,) = line.dispatcher.workers
    usual = worker.on_change
    batcher = WatchedBatcher(replace(LIMITS, delay_seconds=0.05))

    async def scenario() -> None:
        telemetry.set_request_id("the-one-that-armed-it")
        patient = Dispatcher([worker], batcher, Metrics(), worker_wait_seconds=5.0)
        await patient.submit(line.request(1).job)

    line.runner.run(scenario())
    worker.on_change = usual
    assert batcher.asked_by[:2] == ["the-one-that-armed-it", ""]


def test_a_batch_goes_to_the_least_loaded_worker(line: Line) -> None:
    (first,) = line.dispatcher.workers
    usual = first.on_change
    small, large = line.request(1), Request.write(line.arena, SELECTED, 2, max_length=500)

    async def scenario() -> None:
        second = DeviceWorker(WorkerClient(discover("cpu")[0], line.arena, num_threads=1), no_warm_up)
        up = asyncio.Event()
        second.on_change = lambda: up.set() if second.is_up else None
        await second.start()
        await asyncio.wait_for(up.wait(), 60)
        both = Dispatcher([first, second], Batcher(LIMITS), Metrics(), worker_wait_seconds=5.0)
        with line.frozen():
            tasks = [asyncio.create_task(both.submit(large.job))]
            await asyncio.sleep(0)
            assert first.outstanding_tokens > 0
            # The first worker has room as well, but the second has nothing to do.
            await asyncio.wait_for(both.submit(small.job), 30)
            assert not tasks[0].done()
        await asyncio.gather(*tasks)
        await second.stop(1.0)

    line.runner.run(scenario())
    first.on_change = usual
    assert small.is_answered()
    assert large.is_answered(first.client.spec.kind)


@pytest.mark.parametrize(("worker_wait_seconds", "reason"), [(60.0, ""), (0.1, "NO_WORKER")])
def test_what_is_queued_when_a_worker_dies_waits_for_the_next_but_not_for_ever(
    line: Line, worker_wait_seconds: float, reason: str
) -> None:
    (worker,) = line.dispatcher.workers
    usual = worker.on_change
    running, queued = [line.request(seed) for seed in range(2)], [line.request(seed) for seed in (2, 3)]

    async def scenario() -> None:
        line_of = Dispatcher([worker], Batcher(LIMITS), Metrics(), worker_wait_seconds=worker_wait_seconds)
        # It learns that it serves from the first change of its worker.
        await line_of.submit(running[0].job)
        assert worker.client.pid is not None
        os.kill(worker.client.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(line_of.submit(each.job)) for each in (*running, *queued)]
        await asyncio.sleep(0.02)
        assert line_of.queue_depth == len(queued)
        os.kill(worker.client.pid, signal.SIGKILL)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(each, "reason", "") for each in ended] == ["WORKER_LOST"] * 2 + [reason] * 2
        with pytest.raises(FsaError) if reason else nullcontext():
            line_of.require_worker()
        await asyncio.wait_for(worker.client.wait_ready(), 60)

    line.runner.run(scenario())
    worker.on_change = usual
    assert all(each.is_answered(worker.client.spec.kind) for each in queued) == (not reason)


def test_company_without_queries_changes_no_bit(line: Line) -> None:
    busy = [line.request(seed) for seed in range(2)]
    empty, request = Request.without_queries(line.arena, SELECTED), line.request(2)

    async def scenario() -> None:
        with line.frozen():
            first = [asyncio.create_task(line.dispatcher.submit(each.job)) for each in busy]
            await asyncio.sleep(0)
            tasks = [asyncio.create_task(line.dispatcher.submit(each.job)) for each in (empty, request)]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks)
        assert [outcome.batch_requests for outcome in outcomes] == [2, 2]
        await asyncio.gather(*first)

    line.runner.run(scenario())
    assert request.is_answered(line.worker.spec.kind)


def test_a_batch_that_cannot_be_handed_over_fails_and_holds_nothing(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = line.request(1)

    def no_descriptor_left(jobs: object) -> None:
        raise OSError("too many open files")

    async def scenario() -> None:
        with monkeypatch.context() as patches:
            patches.setattr(line.worker, "submit", no_descriptor_left)
            with pytest.raises(OSError, match="too many"):
                await asyncio.wait_for(line.dispatcher.submit(request.job), 60)
        assert line.dispatcher.queue_depth == 0
        assert all(worker.outstanding_tokens == 0 for worker in line.dispatcher.workers)
        await line.dispatcher.submit(request.job)

    line.runner.run(scenario())
    assert request.is_answered(line.worker.spec.kind)


def test_a_segment_that_the_worker_has_no_room_for_costs_the_batch_that_needs_it_and_no_worker(
    device: torch.device,
) -> None:
    """Its own, as the worker is to have no memory left, and the request is large."""
    arena = ArenaPool(32 << 20, segment_bytes=1 << 20)

    async def scenario() -> None:
        worker = WorkerClient(discover(device.type)[0], arena, num_threads=1)
        serving = asyncio.Event()
        dispatcher = Dispatcher(
            [DeviceWorker(worker, no_warm_up)],
            Batcher(LIMITS),
            Metrics(),
            worker_wait_seconds=60.0,
            on_serving_change=lambda is_serving: serving.set() if is_serving else serving.clear(),
        )
        await dispatcher.start()
        await asyncio.wait_for(serving.wait(), 60)
        small = Request.write(arena, SELECTED, 1)
        await dispatcher.submit(small.job)
        pid = worker.pid
        assert pid is not None
        room = num_mapped_bytes(pid) + (4 << 20)
        usual = resource.prlimit(pid, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        large = Request.write(arena, SELECTED, 11, max_length=9000)
        assert large.lease.memory.num_bytes > 8 << 20
        with pytest.raises(FsaError) as caught:
            await dispatcher.submit(large.job)
        assert caught.value.reason == "DEVICE_MEMORY_EXHAUSTED"
        await dispatcher.submit(small.job)
        resource.prlimit(pid, resource.RLIMIT_AS, usual)
        await dispatcher.submit(large.job)
        assert worker.pid == pid
        assert large.is_answered(device.type)
        await dispatcher.stop(1.0)

    asyncio.run(scenario())


def num_mapped_bytes(pid: int) -> int:
    num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return num_pages * resource.getpagesize()


def test_a_batch_that_the_worker_cannot_run_fails_and_the_next_one_works(line: Line) -> None:
    good, bad = line.request(1), line.request(2)
    out_of_bounds = replace(bad.job, memory=Slice(bad.lease.memory.segment, 1 << 40, 256))

    async def scenario() -> None:
        with pytest.raises((WorkerFailed, FsaError)):
            await line.dispatcher.submit(out_of_bounds)
        await asyncio.wait_for(line.serving.wait(), 60)
        await line.dispatcher.submit(good.job)

    line.runner.run(scenario())
    assert good.is_answered(line.worker.spec.kind)

"""One straight line whose permits come back, whichever way it ends."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from service.admission import Admission
from service.arena import ArenaPool
from service.batcher import Batcher, BatchLimits
from service.config import Settings
from service.dispatcher import Dispatcher, Outcome
from service.errors import FsaError
from service.job import Job, JobResult
from service.metrics import Metrics
from service.pb.fsa.v1 import attention_pb2
from service.servicer import INLINE_BYTES, AttentionServicer
from tests.serving import NoDeadline, request_of, tensor_of

MakeCase = Callable[..., Any]


class Worker(Dispatcher):
    """Takes a job whenever ``behave`` does; the answer is what already lay in the memory."""

    def __init__(self, behave: Callable[[], Any]) -> None:
        super().__init__((), Batcher(BatchLimits(1, 1, 1)), Metrics(), worker_wait_seconds=1.0)
        self._behave = behave

    def require_worker(self) -> None:
        """There is one."""

    async def submit(self, job: Job, *, priority: int = 0, deadline: float | None = None) -> Outcome:
        await self._behave()
        return Outcome(JobResult(0.25, 0.5, 0.125), 1, job.problem.num_q_tokens)


class Line:
    """A servicer with real decoding, budgets, arena and encoding."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        settings = Settings()
        self.behave: Callable[[], Any] = lambda: asyncio.sleep(0)
        self.admission = Admission(settings, ArenaPool(settings.max_inflight_bytes))
        self.servicer = AttentionServicer(
            self.admission,
            Worker(lambda: self.behave()),
            Metrics(),
            executor,
            max_message_bytes=settings.max_message_bytes,
            describe=attention_pb2.GetServerInfoResponse,
        )

    async def attend(self, raw: bytes) -> attention_pb2.AttendResponse:
        encoded = await self.servicer.Attend(raw, NoDeadline())  # type: ignore[arg-type]
        return attention_pb2.AttendResponse.FromString(encoded)

    @property
    def held(self) -> tuple[int, int, int]:
        return self.admission.num_requests, self.admission.host_bytes, self.admission.workspace_bytes


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


SIZES = {"inline": 8, "in a thread": 20_000}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def raw(request: pytest.FixtureRequest, make_case: MakeCase) -> bytes:
    case = make_case(q_lens=(request.param,), head_dim=16, num_slots=1, dtype=torch.float16)
    raw = request_of(case, request_id="one").SerializeToString()
    assert (len(raw) > INLINE_BYTES) == (request.param > 100)
    return raw


def test_an_answer_has_its_id_shape_and_timings_and_leaves_nothing_held(
    raw: bytes, executor: ThreadPoolExecutor
) -> None:
    async def scenario() -> None:
        line = Line(executor)
        response = await line.attend(raw)
        sent = attention_pb2.AttendRequest.FromString(raw)
        assert response.request_id == "one"
        assert tensor_of(response.out).shape == tensor_of(sent.q).shape
        timings = response.timings
        assert (timings.h2d, timings.kernel, timings.d2h) == (0.25, 0.5, 0.125)
        # The worker said that it took longer than it was away: that is no negative wait.
        assert timings.queue == 0
        assert line.held == (0, 0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [FsaError("WORKER_LOST", "gone"), RuntimeError("a bug")], ids=repr)
def test_a_failure_leaves_nothing_held(raw: bytes, executor: ThreadPoolExecutor, error: Exception) -> None:
    async def fail() -> None:
        raise error

    async def scenario() -> None:
        line = Line(executor)
        line.behave = fail
        with pytest.raises(type(error)):
            await line.attend(raw)
        assert line.held == (0, 0, 0)

    asyncio.run(scenario())


def test_a_cancellation_at_any_moment_leaves_nothing_held(raw: bytes, executor: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        line = Line(executor)
        for steps in range(12):
            task = asyncio.create_task(line.attend(raw))
            for _ in range(steps):
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert line.held == (0, 0, 0), steps

    asyncio.run(scenario())


def test_draining_waits_for_what_is_in_flight_and_refuses_what_is_new(
    raw: bytes, executor: ThreadPoolExecutor
) -> None:
    async def scenario() -> None:
        line, may_end, is_in = Line(executor), asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            is_in.set()
            await may_end.wait()

        line.behave = wait
        running = asyncio.create_task(line.attend(raw))
        await is_in.wait()
        draining = asyncio.create_task(line.servicer.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        with pytest.raises(FsaError) as caught:
            await line.attend(raw)
        assert caught.value.reason == "DRAINING"
        may_end.set()
        await asyncio.wait_for(draining, 5)
        assert (await running).request_id == "one"

    asyncio.run(scenario())

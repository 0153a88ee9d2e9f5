"""Ten thousand bad requests: each gets its own code and reason, and none gets further than that."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.admission import Admission
from service.arena import ArenaPool
from service.config import Settings
from service.dispatcher import Dispatcher, Outcome
from service.errors import FsaError
from service.job import Job
from service.metrics import Metrics
from service.pb.fsa.v1 import attention_pb2
from service.servicer import AttentionServicer
from tests.fuzz.bad_requests import LIMITS, BadRequest, bad_requests, valid_requests
from tests.serving import LEAK, SERVER_INFO, NoDeadline, ServerProcess, refusal_of

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


class Reached(Exception):
    """A request came as far as the queue."""


class EndOfTheLine(Dispatcher):
    """The queue, except that nothing may be put into it."""

    def require_worker(self) -> None:
        """There would be one."""

    async def submit(self, job: Job, *, priority: int = 0, deadline: float | None = None) -> Outcome:
        raise Reached


class FrontEnd:
    """Decoding, validation and admission as in the server, in this process."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.settings = Settings(**LIMITS)  # type: ignore[arg-type]
        self.admission = Admission(self.settings, ArenaPool(self.settings.max_inflight_bytes))
        self.servicer = self.runner.run(self.make_servicer())

    async def make_servicer(self) -> AttentionServicer:
        return AttentionServicer(
            self.admission,
            EndOfTheLine((), None, Metrics(), worker_wait_seconds=1.0),  # type: ignore[arg-type]
            Metrics(),
            ThreadPoolExecutor(1),
            max_message_bytes=self.settings.max_message_bytes,
            describe=attention_pb2.GetServerInfoResponse,
        )

    def attend(self, raw: bytes) -> None:
        self.runner.run(self.servicer.Attend(raw, NoDeadline()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def front_end() -> Iterator[FrontEnd]:
    front_end = FrontEnd()
    yield front_end
    front_end.runner.close()


@settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=WITHOUT_SHRINKING,
)
@given(bad=bad_requests())
def test_each_fault_has_its_reason_and_nothing_reaches_the_queue(
    front_end: FrontEnd, bad: BadRequest
) -> None:
    with pytest.raises(FsaError) as caught:
        front_end.attend(bad.raw)
    error = caught.value
    assert (error.code.name, error.reason) == (bad.code, bad.reason), error.message
    assert error.metadata | bad.metadata == error.metadata, error.message
    assert error.message
    assert not LEAK.search(error.message)
    assert (front_end.admission.num_requests, front_end.admission.host_bytes) == (0, 0)


@settings(max_examples=50, deadline=None, database=None)
@given(request=valid_requests())
def test_what_the_faults_are_put_into_is_itself_without_fault(
    front_end: FrontEnd, request: attention_pb2.AttendRequest
) -> None:
    with pytest.raises(Reached):
        front_end.attend(request.SerializeToString())


@contextmanager
def valid_traffic(server: ServerProcess) -> Iterator[None]:
    """Valid requests all the while; every answer must be the first one's, bit by bit."""
    raw = valid_requests().map(lambda request: request.SerializeToString())
    request = _first(raw)
    expected = attention_pb2.AttendResponse.FromString(server.call(request)).out
    stop, served, wrong = threading.Event(), [0], [0]

    def serve() -> None:
        while not stop.is_set():
            response = attention_pb2.AttendResponse.FromString(server.call(request))
            served[0] += 1
            wrong[0] += response.out != expected

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert served[0] > 10
    assert wrong[0] == 0


def _first(strategy: st.SearchStrategy[bytes]) -> bytes:
    found: list[bytes] = []

    @settings(max_examples=1, database=None, derandomize=True)
    @given(strategy)
    def draw(value: bytes) -> None:
        found.append(value)

    draw()
    return found[0]


def test_bad_requests_are_refused_on_the_wire_while_valid_ones_are_served(server: ServerProcess) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=400,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=WITHOUT_SHRINKING,
    )
    @given(bad=bad_requests())
    def refuse(bad: BadRequest) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            server.call(bad.raw)
        got = refusal_of(caught.value)
        assert (got.code, got.reason) == (bad.code, bad.reason), got.message
        assert got.metadata | bad.metadata == got.metadata
        assert got.retry_after_seconds is None
        seen[got.reason] += 1

    with valid_traffic(server):
        refuse()
    counted = server.metrics()
    assert {reason: counted["fsa_rejected_total", reason] for reason in seen} == seen
    assert server.health() == "SERVING"


def test_random_bytes_are_invalid_or_fine_and_nothing_else(server: ServerProcess) -> None:
    codes: Counter[str] = Counter()

    def send(raw: bytes, method: str) -> None:
        try:
            server.call(raw, method=method)
            codes["OK"] += 1
        except grpc.RpcError as error:
            codes[refusal_of(error).code] += 1

    @settings(
        max_examples=3_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=WITHOUT_SHRINKING,
    )
    @given(raw=st.binary(max_size=400), method=st.sampled_from(["Attend", "GetServerInfo"]))
    def throw(raw: bytes, method: str) -> None:
        send(raw, SERVER_INFO.replace("GetServerInfo", method))

    with valid_traffic(server):
        throw()
    assert set(codes) <= {"INVALID_ARGUMENT", "OK"}
    assert sum(codes.values()) >= 3_000
    assert server.health() == "SERVING"

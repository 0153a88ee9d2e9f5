"""AttentionService: decode -> admit -> submit -> await -> encode."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import grpc
import grpc.aio

from service import codec, strict, telemetry
from service.admission import Admission, limit_exceeded
from service.dispatcher import Dispatcher, Outcome
from service.errors import FsaError
from service.job import Job
from service.metrics import Metrics
from service.pb.fsa.v1 import attention_pb2
from service.tasks import settled

SERVICE_NAME = "fsa.v1.AttentionService"

# Below this, handing the work to a thread costs more than the work. Above, the event loop, and with it
# health and every other request, must not wait for it.
INLINE_BYTES = 1 << 20

# Another server takes the next attempt, or this one after its restart.
DRAINING_RETRY_SECONDS = 1.0

P = ParamSpec("P")
T = TypeVar("T")

Context = grpc.aio.ServicerContext[bytes, bytes]


class AttentionServicer:
    """Takes and gives the raw bytes of messages. Raises FsaError, which the interceptor puts on the wire."""

    def __init__(
        self,
        admission: Admission,
        dispatcher: Dispatcher,
        metrics: Metrics,
        executor: Executor,
        *,
        max_message_bytes: int,
        describe: Callable[[], attention_pb2.GetServerInfoResponse],
    ) -> None:
        self._admission = admission
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._executor = executor
        self._max_message_bytes = max_message_bytes
        self._describe = describe
        self._num_active = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Attend(self, raw: bytes, context: Context) -> bytes:
        """AttendRequest to AttendResponse."""
        started = time.perf_counter()
        deadline = _deadline(context)
        with ExitStack() as held:
            self._enter()
            held.callback(self._leave)
            self._check_size("the message", len(raw))
            call = await self._run(len(raw), codec.decode_attend, raw, self._admission.check_sizes)
            request_id = call.request_id or telemetry.request_id()
            telemetry.set_request_id(request_id)
            self._check_size("the answer", call.answer_bytes)
            permit = await self._admission.admit(call.problem)
            held.callback(permit.release)
            memory = permit.lease.view()
            await self._run(len(memory), codec.write_inputs, call, memory)
            received = time.perf_counter()
            job = Job(call.problem, permit.lease.memory)
            outcome = await self._dispatcher.submit(job, priority=call.priority, deadline=deadline)
            clock = codec.SendClock(started, time.perf_counter())
            timings = _timings(outcome, received - started, clock.answered - received)
            response = await self._run(
                len(memory), codec.encode_attend, request_id, call, memory, timings, clock
            )
            del memory
            permit.answer(len(response))
            # In flight, and in the budgets, until the client has it: it may read slowly, or not at all.
            sent = held.pop_all().close
            context.add_done_callback(lambda _: sent())  # type: ignore[arg-type]
        self._metrics.observe_stages(timings)
        return response

    async def GetServerInfo(self, raw: bytes, context: Context) -> bytes:
        """GetServerInfoRequest to GetServerInfoResponse."""
        strict.parse(attention_pb2.GetServerInfoRequest, raw)
        return self._describe().SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the gRPC server needs to route the service's methods here, as bytes both ways."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Attend": grpc.unary_unary_rpc_method_handler(self.Attend),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self.GetServerInfo),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def drain(self) -> None:
        """Refuse new Attend requests from now on; returns when answers to those in flight are sent."""
        self._is_draining = True
        await self._idle.wait()

    def _enter(self) -> None:
        """Counts a request in flight; refuses it where it could not be served."""
        if self._is_draining:
            raise FsaError(
                "DRAINING", "the server is shutting down", retry_after_seconds=DRAINING_RETRY_SECONDS
            )
        self._dispatcher.require_worker()
        self._num_active += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._num_active -= 1
        if not self._num_active:
            self._idle.set()

    def _check_size(self, what: str, num_bytes: int) -> None:
        if num_bytes > self._max_message_bytes:
            has = f"{what} has {num_bytes} bytes"
            raise limit_exceeded("max_message_bytes", has, num_bytes, self._max_message_bytes)

    async def _run(self, num_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``work``, here or in a thread, by the bytes it touches."""
        if num_bytes <= INLINE_BYTES:
            return work(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await settled(loop.run_in_executor(self._executor, lambda: work(*args, **kwargs)))


def _deadline(context: Context) -> float | None:
    """The client's deadline on time.monotonic, None when it set none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _timings(outcome: Outcome, receive: float, away: float) -> attention_pb2.Timings:
    """``away`` seconds passed between handing the request over and having its answer."""
    result = outcome.result
    busy = result.h2d_seconds + result.kernel_seconds + result.d2h_seconds
    return attention_pb2.Timings(
        receive=receive,
        queue=max(away - busy, 0.0),
        h2d=result.h2d_seconds,
        kernel=result.kernel_seconds,
        d2h=result.d2h_seconds,
        batch_requests=outcome.batch_requests,
        batch_tokens=outcome.batch_tokens,
    )

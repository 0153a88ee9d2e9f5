"""What every call of ours has in common: its id, its error, its metrics, its line in the log."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from service import telemetry
from service.errors import FsaError, from_exception
from service.metrics import Metrics
from service.servicer import SERVICE_NAME, Context

REQUEST_ID_HEADER = "x-request-id"

log = logging.getLogger("fsa.access")

Behaviour = Callable[[bytes, Context], Awaitable[bytes]]

# A client's deadline begins before the server's, by what sending takes; it cancels at its own.
SENDING_SECONDS = 0.05
# Requests that were taken and failed later; every other failure is a refusal.
_NOT_REJECTED = ("INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED", "WORKER_LOST", "DEVICE_MEMORY_EXHAUSTED")


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of AttentionService; health and reflection pass as they are."""

    def __init__(self, metrics: Metrics, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """``is_stopping``: whether the server itself ends what is in flight."""
        self._metrics = metrics
        self._is_stopping = is_stopping

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            # Of whatever form its name is, gRPC says that there is no such method.
            return handler
        _, service, method = handler_call_details.method.split("/", 2)
        if service != SERVICE_NAME:
            return handler
        behaviour = self._observed(method, handler.unary_unary, _request_id(handler_call_details))
        return grpc.unary_unary_rpc_method_handler(behaviour)

    def _observed(self, method: str, behaviour: Behaviour, request_id: str) -> Behaviour:
        async def observed(raw: bytes, context: Context) -> bytes:
            telemetry.set_request_id(request_id)
            started = time.perf_counter()
            remaining = context.time_remaining()
            error: FsaError | None = None
            response = b""
            try:
                response = await behaviour(raw, context)
            except asyncio.CancelledError:
                if self._is_stopping():
                    error = FsaError("DRAINING", "the server was stopped before the answer was there")
                else:
                    reason = reason_of_cancel(time.perf_counter() - started, remaining)
                    error = FsaError(reason, "the client is gone")
                raise
            except Exception as cause:
                error = self._client_error(cause)
            finally:
                self._record(method, error, time.perf_counter() - started, len(raw), len(response))
            if error is not None:
                status = error.to_status(telemetry.request_id())
                await context.abort(status.code, status.details, status.trailing_metadata)
            return response

        return observed

    def _client_error(self, cause: Exception) -> FsaError:
        error = from_exception(cause, telemetry.request_id())
        if error.request_id:
            telemetry.set_request_id(error.request_id)
        if error is not cause:
            log.error("request failed", exc_info=cause)
        return error

    def _record(
        self, method: str, error: FsaError | None, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        code = grpc.StatusCode.OK if error is None else error.code
        self._metrics.observe_request(method, code.name, seconds)
        fields: dict[str, Any] = {
            "method": method,
            "code": code.name,
            "seconds": round(seconds, 6),
            "request_bytes": request_bytes,
            "response_bytes": response_bytes,
        }
        if error is not None:
            fields["reason"] = error.reason
            if error.reason not in _NOT_REJECTED:
                self._metrics.count_rejected(error.reason)
        log.info("request" if error is None else error.message, extra=fields)


def reason_of_cancel(seconds: float, remaining: float | None) -> str:
    """Why a client went after ``seconds``; ``remaining`` there were until its deadline, if it has one."""
    is_late = remaining is not None and seconds >= remaining - SENDING_SECONDS
    return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"


def _request_id(details: grpc.HandlerCallDetails) -> str:
    """The id from the call's metadata, or a new one; one in the message itself comes to light later."""
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and telemetry.is_request_id(value):
            return value
    return telemetry.new_request_id()

"""Failures of a call, by what the caller can do about them."""

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class AttentionError(Exception):
    """A call that failed.

    ``code``: the gRPC status. ``reason``: the server's UPPER_SNAKE name for it, "" when the failure
    is not the server's own (an unreachable host, a deadline that passed here). ``metadata``: what the
    reason is about, such as the head, token and slot of a bad block index. ``retry_after_seconds``:
    when the server says that waiting helps.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{reason or code.name}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(AttentionError):
    """The request breaks the contract; the same request will fail again."""


class ResourceExhausted(AttentionError):
    """Over a limit for good, or, when ``retry_after_seconds`` is set, over a budget for now."""


class Unavailable(AttentionError):
    """Nobody computed an answer: not reachable, starting, draining, or a worker was lost. Safe to retry."""


class DeadlineExceeded(AttentionError):
    """The call's time was up before its answer was there."""


class InternalError(AttentionError):
    """The server's own fault; report it with the request id."""


_CLASSES: Mapping[grpc.StatusCode, type[AttentionError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
}


def error_from_rpc(error: Any, request_id: str = "") -> AttentionError:
    """The failed call of either client (grpc.RpcError that is a grpc.Call, or grpc.aio.AioRpcError).

    ``request_id``: the one that was sent; without it, the server's own is taken.
    """
    info, retry = _details(error.trailing_metadata() or ())
    return _CLASSES.get(error.code(), AttentionError)(
        error.code(),
        info.reason,
        error.details() or "the server gave no message",
        metadata=info.metadata,
        request_id=request_id or info.metadata.get("request_id", ""),
        retry_after_seconds=None if retry is None else retry.retry_delay.ToNanoseconds() / 1e9,
    )


def _details(
    trailers: Iterable[tuple[str, str | bytes]],
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo | None]:
    info, retry = error_details_pb2.ErrorInfo(), None
    for key, value in trailers:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
    return info, retry

"""Every way a request can fail: one table from reason to gRPC code, and how it goes on the wire.

A status carries ``google.rpc.ErrorInfo{reason, domain="fsa", metadata}``, and ``google.rpc.RetryInfo``
when waiting helps. Messages are sentences of ours; no path, class name or address is ever in one.
"""

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

DOMAIN = "fsa"
MAX_TEXT_LENGTH = 500

CODES: Mapping[str, grpc.StatusCode] = MappingProxyType(
    {
        # The message itself. Reasons about its contents come from fsa_core.validation.InputError
        # and are INVALID_ARGUMENT, all of them.
        "MALFORMED_MESSAGE": grpc.StatusCode.INVALID_ARGUMENT,
        "UNKNOWN_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
        "MISSING_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
        "UNKNOWN_DTYPE": grpc.StatusCode.INVALID_ARGUMENT,
        "WRONG_SHAPE": grpc.StatusCode.INVALID_ARGUMENT,
        "WRONG_BYTE_COUNT": grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST_ID": grpc.StatusCode.INVALID_ARGUMENT,
        # More than this server ever takes, and more than it can take now.
        "LIMIT_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "BUDGET_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DEVICE_MEMORY_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Never answered, safe to send again.
        "WORKER_LOST": grpc.StatusCode.UNAVAILABLE,
        "NO_WORKER": grpc.StatusCode.UNAVAILABLE,
        "DRAINING": grpc.StatusCode.UNAVAILABLE,
        "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
        "CANCELLED": grpc.StatusCode.CANCELLED,
        "INTERNAL": grpc.StatusCode.INTERNAL,
    }
)


class FsaError(Exception):
    """A request's failure, as the client will see it.

    ``retry_after_seconds`` is set when the same request can succeed later. ``request_id`` is set where it
    is known better than by the task's own (see service.telemetry).
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = CODES[reason]
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id

    def to_status(self, request_id: str) -> grpc.Status:
        """The gRPC status: code, message, and the details packed into its trailing metadata."""
        rich = Status(code=self.code.value[0], message=_bounded(self.message))
        metadata = {name: _bounded(value) for name, value in self.metadata.items()}
        info = ErrorInfo(reason=self.reason, domain=DOMAIN, metadata={**metadata, "request_id": request_id})
        rich.details.add().Pack(info)
        if self.retry_after_seconds is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_after_seconds * 1e9))
            rich.details.add().Pack(RetryInfo(retry_delay=delay))
        return rpc_status.to_status(rich)


def from_exception(error: Exception, request_id: str) -> FsaError:
    """The failure that the client may see for ``error``; anything unforeseen becomes INTERNAL.

    An unforeseen exception's own text may name paths, classes or addresses, so the client gets the
    request id, under which the log has the rest.
    """
    if isinstance(error, FsaError):
        return error
    return FsaError(
        "INTERNAL", f"the server failed to answer request {request_id}; its log has the cause under this id"
    )


def _bounded(text: str) -> str:
    """Clients choose what messages quote; trailing metadata has room for a few thousand bytes."""
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 3] + "..."

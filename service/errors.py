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

_CODE_REASONS: Mapping[grpc.StatusCode, tuple[str, ...]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (
        # The message.
        "MALFORMED_MESSAGE",
        "UNKNOWN_FIELD",
        "MISSING_FIELD",
        "INVALID_REQUEST_ID",
        "INVALID_SHAPE",
        "INVALID_BYTE_COUNT",
        # Its contents: fsa_core.validation says what each means.
        "INVALID_TYPE",
        "INVALID_RANK",
        "INVALID_DTYPE",
        "INVALID_DEVICE",
        "INVALID_HEADS",
        "INVALID_HEAD_DIM",
        "INVALID_TOKENS",
        "INVALID_BLOCK_SIZE",
        "INVALID_QUERY_BLOCK_SIZE",
        "INVALID_SOFTMAX_SCALE",
        "INVALID_CU_SEQLENS",
        "INVALID_INDEX_SHAPE",
        "INVALID_OFFSETS",
        "INVALID_PATTERN",
        # What the server is to select by: fsa_core.nsa.config.
        "INVALID_KERNEL_SIZE",
        "INVALID_STRIDE",
        "INVALID_TOP_K",
        "INVALID_NUM_FIRST_BLOCKS",
        "INVALID_NUM_LOCAL_BLOCKS",
        "INVALID_TOP_P",
        "INVALID_MIN_SHARE",
        "INVALID_WINDOW",
        "INVALID_GATES",
        "INDEX_OUT_OF_RANGE",
        "INDEX_NOT_CAUSAL",
        "INDEX_DUPLICATE",
    ),
    # More than this server ever takes, than it can take now, and than the device could hold.
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("LIMIT_EXCEEDED", "BUDGET_EXHAUSTED", "DEVICE_MEMORY_EXHAUSTED"),
    # Never answered, so safe to send again.
    grpc.StatusCode.UNAVAILABLE: ("WORKER_LOST", "NO_WORKER", "DRAINING"),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("DEADLINE_EXCEEDED",),
    grpc.StatusCode.CANCELLED: ("CANCELLED",),
    grpc.StatusCode.INTERNAL: ("INTERNAL",),
}

CODES: Mapping[str, grpc.StatusCode] = MappingProxyType(
    {reason: code for code, reasons in _CODE_REASONS.items() for reason in reasons}
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

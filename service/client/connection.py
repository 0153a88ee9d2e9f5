"""How a client's channel is set up, and what every call of it carries."""

import json
from typing import Any

import grpc

from service.client.errors import Unavailable

ATTEND = "/fsa.v1.AttentionService/Attend"
SERVER_INFO = "/fsa.v1.AttentionService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/Check"
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_LENGTH = 128

DEFAULT_TIMEOUT_SECONDS = 60.0
READY_POLL_SECONDS = 0.05
# Three years. Some later ones would be taken for past ones.
LONGEST_SECONDS = 1e8

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # The server has the say over sizes: it refuses with a reason.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's default waits up to two minutes before it tries a restarted server again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
# For a moment without a server. gRPC makes no more than five attempts, knows nothing of RetryInfo, and would
# keep a copy of each request above 256 KiB, its buffer for retries: service.client.retry goes on from there.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "fsa.v1.AttentionService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 1.5,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def channel_options(*, retry: bool) -> tuple[tuple[str, Any], ...]:
    """With ``retry``, the channel itself sends a call that gets UNAVAILABLE again, for up to a second."""
    if not retry:
        return (*_OPTIONS, ("grpc.enable_retries", 0))
    return (*_OPTIONS, ("grpc.enable_retries", 1), ("grpc.service_config", json.dumps(_SERVICE_CONFIG)))


def checked_timeout(seconds: float) -> float:
    """Raises ValueError for what is no time: negative, or no number."""
    if not seconds >= 0:
        raise ValueError(f"timeout_seconds is {seconds!r}: expected seconds from 0 on, or infinity")
    return seconds


def deadline(seconds: float) -> float | None:
    """What gRPC is told of a timeout: nothing, where it is further away than gRPC can say."""
    return seconds if seconds < LONGEST_SECONDS else None


def metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """The headers of a call: by them a server knows the id of what it refuses before it has read it.

    An id that no header can carry stays in the message, where the server says what is wrong with it.
    """
    is_header = request_id.isascii() and request_id.isprintable() and len(request_id) <= MAX_REQUEST_ID_LENGTH
    return ((REQUEST_ID_HEADER, request_id),) if request_id and is_header else ()


def not_ready(target: str, timeout_seconds: float, status: str) -> Unavailable:
    """What wait_ready raises when the time is up; ``status`` is the last that was seen."""
    message = f"{target} was not ready after {timeout_seconds:g} s; it was {status}"
    return Unavailable(grpc.StatusCode.UNAVAILABLE, "NOT_READY", message)

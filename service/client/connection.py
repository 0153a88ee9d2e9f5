"""How a client's channel is set up: methods, message sizes and reconnection."""

from typing import Any

import grpc

from service.client.errors import Unavailable

ATTEND = "/fsa.v1.AttentionService/Attend"
SERVER_INFO = "/fsa.v1.AttentionService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/Check"

DEFAULT_TIMEOUT_SECONDS = 60.0
READY_POLL_SECONDS = 0.05


# The server has the say over sizes: it refuses with a reason.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's default waits up to two minutes before it tries a restarted server again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # service.client.retry decides what is sent again.
    ("grpc.enable_retries", 0),
)


def not_ready(target: str, timeout_seconds: float, status: str) -> Unavailable:
    """What wait_ready raises when the time is up; ``status`` is the last that was seen."""
    message = f"{target} was not ready after {timeout_seconds:g} s; it was {status}"
    return Unavailable(grpc.StatusCode.UNAVAILABLE, "NOT_READY", message)

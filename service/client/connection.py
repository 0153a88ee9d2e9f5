"""How a client's channel is set up: methods, message sizes, retries and reconnection."""

import json
from typing import Any

import grpc

from service.client.errors import Unavailable

ATTEND = "/fsa.v1.AttentionService/Attend"
SERVER_INFO = "/fsa.v1.AttentionService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/Check"

DEFAULT_TIMEOUT_SECONDS = 60.0
# What gRPC takes for maxAttempts at most; it lowers anything larger by itself.
MAX_ATTEMPTS = 5
# Waits of about 0.2, 0.6, 1.8 and 5 s: longer in sum than a worker takes to come back.
_RETRY_POLICY = {
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_MAX_INT32 = 2**31 - 1
READY_POLL_SECONDS = 0.05


def channel_options(max_attempts: int) -> list[tuple[str, Any]]:
    """Options of a channel whose calls are sent up to ``max_attempts`` times while UNAVAILABLE."""
    if not 1 <= max_attempts <= MAX_ATTEMPTS:
        raise ValueError(f"max_attempts is {max_attempts}; it must be between 1 and {MAX_ATTEMPTS}")
    options: list[tuple[str, Any]] = [
        # The server has the say over sizes: it refuses with a reason.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # gRPC's default waits up to two minutes before it tries a restarted server again.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_retries", int(max_attempts > 1)),
        # A request larger than this buffer (256 KiB by default) is never retried.
        ("grpc.per_rpc_retry_buffer_size", _MAX_INT32),
    ]
    if max_attempts > 1:
        policy = {**_RETRY_POLICY, "maxAttempts": max_attempts}
        method_config = {"name": [{"service": "fsa.v1.AttentionService"}], "retryPolicy": policy}
        options.append(("grpc.service_config", json.dumps({"methodConfig": [method_config]})))
    return options


def not_ready(target: str, timeout_seconds: float, status: str) -> Unavailable:
    """What wait_ready raises when the time is up; ``status`` is the last that was seen."""
    message = f"{target} was not ready after {timeout_seconds:g} s; it was {status}"
    return Unavailable(grpc.StatusCode.UNAVAILABLE, "NOT_READY", message)

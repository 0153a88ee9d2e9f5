"""The Python client: attention computed by a server, numpy or torch in and out.

Needs neither torch nor triton; see docs/client.md.
"""

from service.client.async_client import AsyncAttentionClient
from service.client.errors import (
    AttentionError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    Unavailable,
)
from service.client.patterns import BlockIndices, Dense, Pattern
from service.client.results import AttendResult, Device, Limits, ServerInfo, Timings
from service.client.sync_client import AttentionClient

__all__ = [
    "AsyncAttentionClient",
    "AttendResult",
    "AttentionClient",
    "AttentionError",
    "BlockIndices",
    "DeadlineExceeded",
    "Dense",
    "Device",
    "InternalError",
    "InvalidRequest",
    "Limits",
    "Pattern",
    "ResourceExhausted",
    "ServerInfo",
    "Timings",
    "Unavailable",
]

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
from service.client.patterns import BlockCsr, BlockIndices, BlockMask, Dense, Pattern, Select, VerticalSlash
from service.client.results import AttendResult, Device, Limits, PatternLimits, ServerInfo, Timings
from service.client.sync_client import AttentionClient

__all__ = [
    "AsyncAttentionClient",
    "AttendResult",
    "AttentionClient",
    "AttentionError",
    "BlockCsr",
    "BlockIndices",
    "BlockMask",
    "DeadlineExceeded",
    "Dense",
    "Device",
    "InternalError",
    "InvalidRequest",
    "Limits",
    "Pattern",
    "PatternLimits",
    "ResourceExhausted",
    "Select",
    "ServerInfo",
    "Timings",
    "Unavailable",
    "VerticalSlash",
]

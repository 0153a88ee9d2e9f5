"""What the service answers, as the caller sees it."""

from dataclasses import dataclass
from typing import Generic

from service.client.arrays import ArrayT


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server spent the time of one request, and the batch that the request rode in.

    ``h2d``, ``kernel`` and ``d2h`` are of the whole batch. ``total`` runs from the first byte decoded
    to the answer encoded; the network is not in it.
    """

    receive_seconds: float
    queue_seconds: float
    h2d_seconds: float
    kernel_seconds: float
    d2h_seconds: float
    send_seconds: float
    total_seconds: float
    batch_requests: int
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class AttendResult(Generic[ArrayT]):
    """One answer, in arrays of the kind that q was (and, for torch, on its device).

    ``out``: [q tokens, q heads, value_dim] in the dtype of q; zeros for a token without keys.
    ``lse``: float32 [q tokens, q heads], natural log-sum-exp of each row's scores, -inf for a token
    without keys; None unless asked for. ``block_indices``: int32 [kv heads, q tokens, top_k], what the server
    chose for Select, ascending, then -1; None unless asked for.
    """

    out: ArrayT
    lse: ArrayT | None
    timings: Timings
    request_id: str
    block_indices: ArrayT | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the server; ``kind`` is "cuda" or "cpu", ``up`` whether its worker takes requests."""

    index: int
    kind: str
    name: str
    memory_bytes: int
    up: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit that a request can meet. A zero means none."""

    max_message_bytes: int
    max_inflight_bytes: int
    max_inflight_requests: int
    max_tokens: int
    max_sequences: int
    max_q_heads: int
    min_head_dim: int
    max_head_dim: int
    block_sizes: tuple[int, ...]
    max_slots: int
    workspace_bytes: int
    max_batch_requests: int
    max_batch_tokens: int
    max_batch_delay_seconds: float


@dataclass(frozen=True, slots=True)
class PatternLimits:
    """What a pattern can be.

    ``max_slots``: blocks that a row may select, 0 for no limit. ``shared_rows``: whether it takes a
    query_block_size. ``causal_only``: whether the request has to be causal. ``max_kernel_size``: keys in a
    window of Select, at most; 0 where there are no windows.
    """

    name: str
    max_slots: int
    shared_rows: bool
    causal_only: bool
    max_kernel_size: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is and what it takes.

    ``dtypes`` and ``patterns`` are the names it serves, ``kernels`` the implementations in use,
    ``versions`` those of what the answers depend on (python, torch, triton, cuda, grpc), ``pattern_limits``
    what each of the patterns can be; empty from a server that does not say.
    """

    version: str
    protocol: str
    devices: tuple[Device, ...]
    dtypes: tuple[str, ...]
    patterns: tuple[str, ...]
    kernels: tuple[str, ...]
    limits: Limits
    versions: dict[str, str]
    pattern_limits: tuple[PatternLimits, ...]

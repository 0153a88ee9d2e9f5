"""The contract of the operator's functions, checked where data enters, beyond what attention itself checks.

Reasons are those of fsa_core.validation, INVALID_BRANCHES, INVALID_GATES and INVALID_COMPRESSION.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from fsa_core.errors import refuse, refuse_bad_starts
from fsa_core.nsa.compression import Compression, count_windows
from fsa_core.nsa.config import NSAConfig
from fsa_core.packing import Placement, place_queries, single_sequence, uploaded
from fsa_core.validation import check_tensor, checked_limit, validate_dense


@dataclass(frozen=True)
class Call:
    """What a validated call has beside its tensors; cu_seqlens_k are the keys' before compression.

    ``key_starts`` are cu_seqlens_k on the host. ``known_cu_seqlens_cmp``: what cu_seqlens_cmp is, if that is
    known.
    """

    config: NSAConfig
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_starts: tuple[int, ...]
    softmax_scale: float
    workspace_limit_bytes: int
    known_cu_seqlens_cmp: torch.Tensor | None = None

    @cached_property
    def window_starts(self) -> tuple[int, ...]:
        """Where each sequence's windows start, and their total."""
        config = self.config
        windows = (
            max(end - start - config.kernel_size + config.stride, 0) // config.stride
            for start, end in itertools.pairwise(self.key_starts)
        )
        return tuple(itertools.accumulate(windows, initial=0))

    @cached_property
    def cu_seqlens_cmp(self) -> torch.Tensor:
        """``window_starts`` on the device: int32 [num_sequences + 1]."""
        if self.known_cu_seqlens_cmp is not None:
            return self.known_cu_seqlens_cmp
        device = self.cu_seqlens_k.device
        if len(self.window_starts) == 2:
            return single_sequence(self.window_starts[1], device)
        return uploaded(torch.tensor(self.window_starts, dtype=torch.int32, device="cpu"), device)

    def place(self, num_q_tokens: int) -> Placement:
        return place_queries(self.cu_seqlens_q, self.cu_seqlens_k, num_q_tokens, causal=True)

    def visible_windows(self, placed: Placement) -> torch.Tensor:
        """int64 [num_q_tokens]: how many windows, from the first, have their last key in a query's sight."""
        return count_windows(placed.num_visible_keys, self.config.kernel_size, self.config.stride)


def validate_over_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    workspace_limit_bytes: int,
) -> Call:
    """Check causal attention over keys as they are; shapes and errors as in fsa_core.validation."""
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    scale = _checked_scale(q, k, v, softmax_scale, **starts)
    return _call(q, config, **starts, num_keys=k.shape[0], softmax_scale=scale, limit=workspace_limit_bytes)


def validate_over_windows(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    workspace_limit_bytes: int,
) -> Call:
    """Check attention over compressed keys, which errors call k and v.

    cu_seqlens_k: int32 [num_sequences + 1], the keys' before compression; None: as many keys as queries.
    """
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    scale = _checked_scale(q, k_cmp, v_cmp, softmax_scale, **starts)
    if cu_seqlens_k is None:
        starts["cu_seqlens_k"] = cu_seqlens_q
    num_keys = q.shape[0] if cu_seqlens_k is None else None
    call = _call(q, config, **starts, num_keys=num_keys, softmax_scale=scale, limit=workspace_limit_bytes)
    check_window_count(call, k_cmp)
    return call


def _checked_scale(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> float:
    """The scale of a call that is right but for the values of cu_seqlens, which nothing has read."""
    problem = validate_dense(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=True,
        check_values=False,
    )
    return problem.softmax_scale


def _call(
    q: torch.Tensor,
    config: NSAConfig,
    *,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    num_keys: int | None,
    softmax_scale: float,
    limit: int,
) -> Call:
    """Reads cu_seqlens, each once, and refuses what is wrong; num_keys None: as many as they say."""
    check_config(config)
    limit = checked_limit(limit)
    num_queries = q.shape[0]
    if cu_seqlens_k is None:
        assert num_keys is not None
        key_starts: list[int] = [0, num_keys]
    else:
        key_starts = cu_seqlens_k.tolist()
    if cu_seqlens_q is not None:
        query_starts = key_starts if cu_seqlens_q is cu_seqlens_k else cu_seqlens_q.tolist()
        refuse_bad_starts("cu_seqlens_q", query_starts, num_queries)
    refuse_bad_starts("cu_seqlens_k", key_starts, num_keys)
    if cu_seqlens_q is None:
        cu_seqlens_q = single_sequence(num_queries, q.device)
    if cu_seqlens_k is None:
        is_same = cu_seqlens_q.numel() == 2 and num_keys == num_queries
        cu_seqlens_k = cu_seqlens_q if is_same else single_sequence(key_starts[1], q.device)
    return Call(config, cu_seqlens_q, cu_seqlens_k, tuple(key_starts), softmax_scale, limit)


def check_window_count(call: Call, k_cmp: torch.Tensor) -> None:
    """Refuse compressed keys that are not as many as the call's keys have windows."""
    num_windows = call.window_starts[-1]
    if k_cmp.shape[0] != num_windows:
        expected = f"{num_windows}, the windows in {call.key_starts[-1]} keys"
        refuse("INVALID_TOKENS", "k_cmp", "token count", k_cmp.shape[0], expected)


def check_starts(name: str, cu_seqlens: torch.Tensor, num_tokens: int) -> list[int]:
    """cu_seqlens on the host; refuses what is not int32, from 0, never decreasing, to ``num_tokens``."""
    if not isinstance(cu_seqlens, torch.Tensor):
        refuse("INVALID_TYPE", name, "type", type(cu_seqlens).__name__, "torch.Tensor")
    if cu_seqlens.dtype != torch.int32:
        refuse("INVALID_DTYPE", name, "dtype", cu_seqlens.dtype, "int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        refuse("INVALID_CU_SEQLENS", name, "shape", list(cu_seqlens.shape), "[num_sequences + 1]")
    starts: list[int] = cu_seqlens.tolist()
    refuse_bad_starts(name, starts, num_tokens)
    return starts


def check_config(config: NSAConfig) -> None:
    if not isinstance(config, NSAConfig):
        refuse("INVALID_TYPE", "config", "type", type(config).__name__, "NSAConfig")


def check_compression(name: str, compression: Compression, config: NSAConfig) -> None:
    """Refuse what is no compression, or one of other windows than the config's."""
    if not isinstance(compression, Compression):
        refuse("INVALID_TYPE", name, "type", type(compression).__name__, "Compression")
    got = (compression.kernel_size, compression.stride)
    if got != (config.kernel_size, config.stride):
        expected = f"{(config.kernel_size, config.stride)}, those of config"
        refuse("INVALID_COMPRESSION", name, "kernel size and stride", got, expected)


def check_compressed(k_cmp: torch.Tensor, v_cmp: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse compressed K and V of other heads or dims than what they are added up with."""
    for name, compressed, x in (("k_cmp", k_cmp, k), ("v_cmp", v_cmp, v)):
        got, expected = list(compressed.shape[1:]), list(x.shape[1:])
        if got != expected:
            refuse("INVALID_HEADS", name, "heads and dim", got, f"{expected}, those of {name[0]}")


def check_branches(branches: tuple[torch.Tensor, ...]) -> None:
    """Refuse what are not outputs of one call: [num_q_tokens, num_q_heads, value_dim], all alike."""
    if not branches:
        refuse("INVALID_BRANCHES", "branches", "length", 0, "at least 1")
    first = branches[0]
    for i, branch in enumerate(branches):
        name = f"branches[{i}]"
        check_tensor(name, branch, "[num_q_tokens, num_q_heads, value_dim]", 3)
        for what in ("shape", "dtype", "device"):
            got, expected = getattr(branch, what), getattr(first, what)
            if got != expected:
                refuse("INVALID_BRANCHES", name, what, got, f"{expected}, that of branches[0]")


def check_gates(gates: torch.Tensor, q: torch.Tensor, count: int = 3) -> None:
    """Refuse gates that are not [num_q_tokens, num_q_heads, count], of floating point, beside q."""
    check_tensor("gates", gates, "[num_q_tokens, num_q_heads, branches]", 3)
    expected = [*q.shape[:2], count]
    if list(gates.shape) != expected:
        refuse("INVALID_GATES", "gates", "shape", list(gates.shape), f"{expected}, a gate for each branch")
    if not gates.is_floating_point():
        refuse("INVALID_DTYPE", "gates", "dtype", gates.dtype, "floating point")
    if gates.device != q.device:
        refuse("INVALID_DEVICE", "gates", "device", gates.device, f"{q.device}, that of q")

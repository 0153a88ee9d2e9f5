"""The contract of the operator's functions, checked where data enters, beyond what attention itself checks.

Reasons are those of fsa_core.validation, INVALID_GATES and INVALID_COMPRESSION.
"""

from dataclasses import dataclass

import torch

from fsa_core.errors import refuse, refuse_bad_starts
from fsa_core.nsa.compression import Compression, compressed_cu_seqlens, count_windows
from fsa_core.nsa.config import NSAConfig
from fsa_core.packing import Placement, place_queries, single_sequence
from fsa_core.validation import validate_dense


@dataclass(frozen=True, slots=True)
class Call:
    """What a validated call has beside its tensors; cu_seqlens_k are the keys' before compression."""

    config: NSAConfig
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    softmax_scale: float
    workspace_limit_bytes: int

    @property
    def cu_seqlens_cmp(self) -> torch.Tensor:
        """Where each sequence's windows start: int32 [num_sequences + 1]."""
        return compressed_cu_seqlens(self.cu_seqlens_k, self.config.kernel_size, self.config.stride)

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
    problem = validate_dense(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=True,
    )
    if cu_seqlens_q is None:
        cu_seqlens_q = single_sequence(q.shape[0], q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = single_sequence(k.shape[0], q.device)
    return Call(config, cu_seqlens_q, cu_seqlens_k, problem.softmax_scale, workspace_limit_bytes)


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
    if cu_seqlens_k is None:
        cu_seqlens_k = single_sequence(q.shape[0], q.device) if cu_seqlens_q is None else cu_seqlens_q
    check_starts("cu_seqlens_k", cu_seqlens_k)
    starts = compressed_cu_seqlens(cu_seqlens_k, config.kernel_size, config.stride)
    if k_cmp.shape[0] != int(starts[-1]):
        expected = f"{int(starts[-1])}, the windows in {int(cu_seqlens_k[-1])} keys"
        refuse("INVALID_TOKENS", "k_cmp", "token count", k_cmp.shape[0], expected)
    problem = validate_dense(
        q,
        k_cmp,
        v_cmp,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=starts,
        softmax_scale=softmax_scale,
        causal=True,
    )
    if cu_seqlens_q is None:
        cu_seqlens_q = single_sequence(q.shape[0], q.device)
    return Call(config, cu_seqlens_q, cu_seqlens_k, problem.softmax_scale, workspace_limit_bytes)


def check_starts(name: str, cu_seqlens: torch.Tensor, *, num_tokens: int | None = None) -> None:
    """Refuse cu_seqlens that are not int32, from 0, never decreasing, to ``num_tokens`` if that is given."""
    if cu_seqlens.dtype != torch.int32:
        refuse("INVALID_DTYPE", name, "dtype", cu_seqlens.dtype, "int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        refuse("INVALID_CU_SEQLENS", name, "shape", list(cu_seqlens.shape), "[num_sequences + 1]")
    refuse_bad_starts(name, cu_seqlens.tolist(), num_tokens)


def check_compression(name: str, compression: Compression, config: NSAConfig) -> None:
    """Refuse a compression of other windows than the config's."""
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


def check_gates(gates: torch.Tensor, q: torch.Tensor) -> None:
    """Refuse gates that are not [num_q_tokens, num_q_heads, 3], of floating point, beside q."""
    expected = [*q.shape[:2], 3]
    if list(gates.shape) != expected:
        refuse("INVALID_GATES", "gates", "shape", list(gates.shape), f"{expected}, a gate for each branch")
    if not gates.is_floating_point():
        refuse("INVALID_DTYPE", "gates", "dtype", gates.dtype, "floating point")
    if gates.device != q.device:
        refuse("INVALID_DEVICE", "gates", "device", gates.device, f"{q.device}, that of q")

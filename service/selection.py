"""A request's SparsityPattern: read, checked, and written out as what the worker takes.

That is block indices of every query token, or what is needed to choose them there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fsa_core.block_csr import BlockCsr
from fsa_core.block_mask import BlockMask
from fsa_core.compact import CompactPattern
from fsa_core.errors import refuse
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import validate_selecting
from fsa_core.packing import row_starts
from fsa_core.patterns import BlockIndices, expand_query_blocks
from fsa_core.problem import Problem
from fsa_core.validation import InputError, validate_compact, validate_dense, validate_selected
from fsa_core.vertical_slash import VerticalSlash
from service import strict, tensors
from service.pb.fsa.v1 import pattern_pb2


@dataclass(frozen=True, slots=True)
class Select:
    """The worker is to choose; ``gates`` as in ``validate_selecting``."""

    config: NSAConfig
    gates: torch.Tensor | None
    return_block_indices: bool


Pattern: TypeAlias = BlockIndices | CompactPattern | Select

_Payloads: TypeAlias = Mapping[strict.Path, memoryview]


def read(message: pattern_pb2.SparsityPattern, payloads: _Payloads) -> Pattern | None:
    """The pattern, its tensors views of the received bytes; None is dense. Nothing is checked but these.

    Raises FsaError, or InputError for a byte of a mask that is neither 0 nor 1.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise tensors.missing("pattern")
    if kind == "dense":
        return None
    variant = getattr(message, kind)

    def tensor(name: str, label: str = "") -> torch.Tensor:
        return tensors.read(label or name, variant, ("pattern", kind, name), payloads)

    return _READERS[kind](variant, tensor)


def validate(
    pattern: Pattern | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> Problem:
    """The sizes of the call with the options of validate_dense, or InputError."""
    if pattern is None:
        return validate_dense(q, k, v, **options)
    if isinstance(pattern, Select):
        return validate_selecting(q, k, v, pattern.gates, config=pattern.config, **options)
    if isinstance(pattern, CompactPattern):
        return validate_compact(q, k, v, pattern, **options)
    options |= {"block_size": pattern.block_size, "query_block_size": pattern.query_block_size}
    return validate_selected(q, k, v, pattern.indices, **options)


def write(
    pattern: BlockIndices | CompactPattern,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool,
) -> None:
    """Fill int32 ``block_indices`` [index heads, q tokens, slots] with the normal form of a valid pattern."""
    if isinstance(pattern, BlockIndices):
        rows = pattern.indices
    elif pattern.query_block_size == 1:
        pattern.write_rows(block_indices, cu_seqlens_q, cu_seqlens_k)
        return
    else:
        num_rows = int(row_starts(cu_seqlens_q, pattern.query_block_size)[-1])
        rows = block_indices.new_empty(block_indices.shape[0], num_rows, block_indices.shape[2])
        pattern.write_rows(rows, cu_seqlens_q, cu_seqlens_k)
    expanded = expand_query_blocks(
        rows,
        query_block_size=pattern.query_block_size,
        block_size=pattern.block_size,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
    )
    block_indices.copy_(expanded)


def _block_indices(variant: Any, tensor: Callable[..., torch.Tensor]) -> Pattern:
    indices = tensor("indices", "block_indices")
    return BlockIndices(indices, variant.block_size, variant.query_block_size or 1)


def _block_csr(variant: Any, tensor: Callable[..., torch.Tensor]) -> Pattern:
    sizes = (variant.block_size, variant.query_block_size or 1)
    return BlockCsr(tensor("offsets"), tensor("indices"), *sizes)


def _block_mask(variant: Any, tensor: Callable[..., torch.Tensor]) -> Pattern:
    mask = tensor("mask")
    if mask.dtype is torch.bool and mask.dim() == 3:
        _check_bytes(mask.view(torch.uint8))
    return BlockMask(mask, variant.block_size, variant.query_block_size or 1)


def _vertical_slash(variant: Any, tensor: Callable[..., torch.Tensor]) -> Pattern:
    return VerticalSlash(tensor("vertical"), tensor("slash"), variant.block_size)


def _select(variant: Any, tensor: Callable[..., torch.Tensor]) -> Pattern:
    gates = tensor("gates") if variant.HasField("gates") else None
    if gates is None and variant.window:
        refuse("INVALID_WINDOW", "window", "value", variant.window, "0, as only a gated sum has a window")
    names = ("kernel_size", "stride", "block_size", "top_k", "num_first_blocks", "num_local_blocks")
    shares = ("top_p", "min_share")
    config = NSAConfig(
        **{name: getattr(variant, name) for name in names},
        **{name: getattr(variant, name) for name in shares if variant.HasField(name)},
        # Of no effect without gates, and then the same for all, so that they ride together.
        window=1 if gates is None else variant.window,
    )
    return Select(config, gates, variant.return_block_indices)


_READERS: Mapping[str, Callable[[Any, Callable[..., torch.Tensor]], Pattern]] = {
    "block_indices": _block_indices,
    "block_csr": _block_csr,
    "block_mask": _block_mask,
    "vertical_slash": _vertical_slash,
    "select": _select,
}


def _check_bytes(mask: torch.Tensor) -> None:
    """Refuse a byte [heads, rows, blocks] that is no bool: what torch makes of one is not defined."""
    if mask.numel() and int(mask.max()) > 1:
        head, row, block = (mask > 1).nonzero()[0].tolist()
        value, expected = int(mask[head, row, block]), "0 or 1"
        message = f"mask[head {head}, row {row}, block {block}] is a byte of {value}: expected {expected}"
        where = {"head": head, "row": row, "index": block, "value": value, "expected": expected}
        raise InputError("INVALID_PATTERN", "mask", message, **where)

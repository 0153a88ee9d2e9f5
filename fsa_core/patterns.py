"""Sparsity patterns, and the one normal form that everything after them knows: a row a query token.

What other systems produce becomes ``BlockIndices`` first: ``from_csr`` (FlashInfer's BSR, dynamic budgets),
``from_block_mask`` (SeerAttention, XAttention), ``from_vertical_slash`` (MInference), ``all_blocks`` (dense).
These check what they read, and raise InputError; the ids that come out of them are checked by
``selected_attention`` as any others.
"""

from dataclasses import dataclass

import torch

from fsa_core.block_csr import BlockCsr
from fsa_core.block_mask import BlockMask
from fsa_core.errors import refuse_bad_starts
from fsa_core.packing import place_queries, row_starts
from fsa_core.problem import BLOCK_SIZES
from fsa_core.validation import check_tensor, checked_choice, checked_flag, checked_sequences
from fsa_core.vertical_slash import VerticalSlash


@dataclass(frozen=True, slots=True)
class BlockIndices:
    """Selected KV blocks: int32 ``indices`` [1 | num_kv_heads | num_q_heads, rows, num_slots].

    Each row lists block ids inside its own sequence, -1 in unused slots, for ``query_block_size`` queries
    counted from the first query of each sequence. ``block_size`` is in keys.
    """

    indices: torch.Tensor
    block_size: int
    query_block_size: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """Full attention."""


Pattern = BlockIndices | Dense


def expand_query_blocks(
    block_indices: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    num_q_tokens: int | None = None,
) -> torch.Tensor:
    """The normal form of validated indices: int32 [heads, num_q_tokens, num_slots], one row a token.

    Under ``causal`` a row may name blocks that only its later queries reach; for the earlier ones they
    become -1. ``num_q_tokens`` saves reading it from ``cu_seqlens_q`` (a synchronisation on CUDA).
    """
    if query_block_size == 1:
        return block_indices
    num_q_tokens = int(cu_seqlens_q[-1]) if num_q_tokens is None else num_q_tokens
    if block_indices.is_cuda and num_q_tokens > 0:
        # Triton is imported when a kernel is first needed.
        from fsa_core.kernels.row_expansion import expand_rows

        return expand_rows(
            block_indices,
            query_block_size=query_block_size,
            block_size=block_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            causal=causal,
            num_q_tokens=num_q_tokens,
        )
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, num_q_tokens, causal=causal)
    starts = row_starts(cu_seqlens_q, query_block_size)[placed.sequence]
    token = torch.arange(num_q_tokens, device=block_indices.device)
    row = starts + (token - cu_seqlens_q[placed.sequence]) // query_block_size
    ids = block_indices.index_select(1, row.clamp_(0, max(block_indices.shape[1] - 1, 0)))
    if causal:
        # Of the dtype of the ids: a comparison that converts them takes twice as long.
        num_visible_blocks = (-(-placed.num_visible_keys // block_size)).int()
        ids.masked_fill_(ids >= num_visible_blocks[:, None], -1)
    return ids


def from_csr(
    offsets: torch.Tensor, indices: torch.Tensor, *, block_size: int, query_block_size: int = 1
) -> BlockIndices:
    """Block ids with a count of their own in each row: FlashInfer's BSR, dynamic budgets; see BlockCsr."""
    pattern = BlockCsr(offsets, indices, block_size, query_block_size)
    pattern.check_offsets()
    heads, rows = offsets.shape[0], offsets.shape[1] - 1
    ids = torch.empty(heads, rows, pattern.num_slots, dtype=torch.int32, device=offsets.device)
    pattern.write_rows(ids)
    return BlockIndices(ids, block_size, query_block_size)


def from_block_mask(mask: torch.Tensor, *, block_size: int, query_block_size: int) -> BlockIndices:
    """Blocks that are marked, a row for every ``query_block_size`` queries; see BlockMask."""
    pattern = BlockMask(mask, block_size, query_block_size)
    pattern.check_mask()
    ids = torch.empty(*mask.shape[:2], pattern.num_slots, dtype=torch.int32, device=mask.device)
    pattern.write_rows(ids)
    return BlockIndices(ids, block_size, query_block_size)


def from_vertical_slash(
    vertical: torch.Tensor,
    slash: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> BlockIndices:
    """Columns that all queries see, and diagonals, causal, a row a token; see VerticalSlash.

    cu_seqlens_q, cu_seqlens_k: int32 [num_sequences + 1], where each packed sequence starts, and the total.
    """
    pattern = VerticalSlash(vertical, slash, checked_choice("block_size", block_size, BLOCK_SIZES))
    pattern.check_entries()
    _check_starts(cu_seqlens_q, cu_seqlens_k)
    shape = (len(vertical), int(cu_seqlens_q[-1]), pattern.num_slots(cu_seqlens_k))
    ids = torch.empty(shape, dtype=torch.int32, device=vertical.device)
    pattern.write_rows(ids, cu_seqlens_q, cu_seqlens_k)
    return BlockIndices(ids, pattern.block_size)


def all_blocks(
    *, block_size: int, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, causal: bool
) -> BlockIndices:
    """Every block: full attention as a pattern, a row for ``block_size`` queries.

    cu_seqlens_q, cu_seqlens_k: int32 [num_sequences + 1], where each packed sequence starts, and the total.

    ``dense_attention`` computes the same faster; this is what the sparse kernels make of it. Raises
    ``InputError`` from ``selected_attention`` when a sequence has more blocks than a row may have slots.
    """
    block_size = checked_choice("block_size", block_size, BLOCK_SIZES)
    causal = checked_flag("causal", causal)
    _check_starts(cu_seqlens_q, cu_seqlens_k)
    starts = row_starts(cu_seqlens_q, block_size)
    row = torch.arange(int(starts[-1]), device=starts.device)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    num_keys, num_queries = (x.long().diff()[sequence] for x in (cu_seqlens_k, cu_seqlens_q))
    num_visible = num_keys
    if causal:
        end_of_row = torch.minimum((row - starts[sequence] + 1) * block_size, num_queries)
        num_visible = (num_keys - num_queries + end_of_row).clamp(min=0)
    num_visible_blocks = -(-num_visible // block_size)
    block = torch.arange(max(int(num_visible_blocks.amax()) if len(row) else 0, 1), device=starts.device)
    ids = block.where(block < num_visible_blocks[:, None], -1)
    return BlockIndices(ids[None].int(), block_size, block_size)


def _check_starts(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    """Refuse what are not the starts of as many sequences; their contents are read."""
    named = (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    for name, starts in named:
        # Without q and k, None would not say how long the one sequence is.
        check_tensor(name, starts, "[num_sequences + 1]", 1)
    checked_sequences(cu_seqlens_q, cu_seqlens_k, device=None)
    for name, starts in named:
        refuse_bad_starts(name, starts.tolist(), num_tokens=None)

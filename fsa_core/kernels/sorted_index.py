"""Inversion of block_indices in an order that never varies: for each KV block, its pairs by token and slot.

The forward pass gives every pair's result a place of its own and may take pairs in any order. Gradients of
keys are sums over a block's pairs, so here the order is part of the answer, and a stable sort makes it.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from fsa_core.kernels.index import MAX_SLOTS_IN_TILE, PAIRS_IN_TILE, SLOT_BITS
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import load_segments
from fsa_core.plan import search_steps

NO_SEGMENT = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SortedIndex:
    """The pairs of a group of tokens, cut into chunks; all int32.

    A row is one chunk under one index head: row = head * num_chunks + chunk.

    keys [heads, tokens, slots]: row * segments + segment, or 2**31 - 1 for a slot that selects nothing.
    pairs [heads * tokens * slots]: token << SLOT_BITS | slot, the token counted from the chunk's first; by
    key, and then by token and slot.
    offsets [rows * segments + 1]: where each row's segments begin in ``pairs``.
    item_offsets [rows, segments + 1]: the first work item of each segment; the last is how many there are.
    split_offsets [rows, segments + 1]: the same, counting only segments of more than one item.
    item_segment [rows, max_items]: the segment that an item belongs to.
    """

    keys: torch.Tensor
    pairs: torch.Tensor
    offsets: torch.Tensor
    item_offsets: torch.Tensor
    split_offsets: torch.Tensor
    item_segment: torch.Tensor


@kernel
def _keys(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    keys_ptr,
    pairs_ptr,
    first_token,
    first_row_token,
    num_tokens,
    chunk_tokens,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    first_head,
    group_pairs,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    rows, segments, inside, places = load_segments(
        indices_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token, first_row_token, num_tokens,
        chunk_tokens, head_stride, num_slots, num_sequences, search_steps, num_segments, num_chunks,
        first_head, BLOCK_SIZE, TOKENS, SLOTS,
    )  # fmt: skip
    keys = tl.where(segments >= 0, rows[:, None] * num_segments + segments, NO_SEGMENT)
    first_pair = tl.program_id(2).to(tl.int64) * group_pairs
    tl.store(keys_ptr + first_pair + places, keys, mask=inside)
    chunk_places = places - ((rows - tl.program_id(2) * num_chunks) * chunk_tokens * num_slots)[:, None]
    pairs = (chunk_places // num_slots << SLOT_BITS) | chunk_places % num_slots
    tl.store(pairs_ptr + first_pair + places, pairs, mask=inside)


def sorted_index(
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    first_token: int,
    num_tokens: int,
    chunk_tokens: int,
    num_segments: int,
    block_size: int,
    pairs_per_item: int,
    max_items: int,
) -> SortedIndex:
    """Indexes ``num_tokens`` query tokens from ``first_token``, in chunks of ``chunk_tokens``.

    ``block_indices`` is int32 [heads, total_q, slots], every head's part contiguous.
    """
    num_heads, _, num_slots = block_indices.shape
    num_chunks = -(-num_tokens // chunk_tokens)
    keys, pairs = (block_indices.new_empty(num_heads, num_tokens, num_slots) for _ in range(2))
    slots = min(1 << (num_slots - 1).bit_length(), MAX_SLOTS_IN_TILE)
    tokens = PAIRS_IN_TILE // slots
    num_sequences = cu_seqlens_q.numel() - 1
    _keys[-(-num_tokens // tokens), -(-num_slots // slots), num_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, keys, pairs, first_token, 0, num_tokens, chunk_tokens,
        block_indices.stride(0), num_slots, num_sequences, search_steps(num_sequences), num_segments,
        num_chunks, 0, num_tokens * num_slots, BLOCK_SIZE=block_size, TOKENS=tokens, SLOTS=slots,
    )  # fmt: skip
    in_order, order = torch.sort(keys.flatten(), stable=True)
    num_rows = num_heads * num_chunks
    every = torch.arange(num_rows * num_segments + 1, dtype=torch.int32, device=keys.device)
    offsets = torch.searchsorted(in_order, every, out_int32=True)
    items = -(-offsets.diff().view(num_rows, num_segments) // pairs_per_item)
    item_offsets = _starts(items)
    item = torch.arange(max_items, dtype=torch.int32, device=keys.device).expand(num_rows, -1).contiguous()
    return SortedIndex(
        keys=keys,
        pairs=pairs.flatten().index_select(0, order),
        offsets=offsets,
        item_offsets=item_offsets,
        split_offsets=_starts(items * (items > 1)),
        item_segment=torch.searchsorted(item_offsets, item, right=True, out_int32=True) - 1,
    )


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n + 1]: the sums of the counts that come before, and of all."""
    starts = counts.new_zeros(len(counts), counts.shape[1] + 1)
    torch.cumsum(counts, 1, dtype=torch.int32, out=starts[:, 1:])
    return starts

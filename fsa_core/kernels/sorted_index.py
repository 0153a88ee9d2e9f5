"""Inversion of block_indices in an order that never varies: for each KV block, its pairs by token and slot.

The forward pass gives every pair's result a place of its own and may take pairs in any order. Gradients of
keys are sums over a block's pairs, so here the order is part of the answer, and a stable sort makes it.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from fsa_core.kernels.index import (
    MAX_SLOTS_IN_TILE,
    PAIRS_IN_TILE,
    SEGMENTS_IN_TILE,
    SLOT_BITS,
    store_offsets,
)
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import load_segments
from fsa_core.plan import search_steps

# Half as many bits are sorted in half the time.
MAX_INT16 = 2**15 - 1


@dataclass(frozen=True, slots=True)
class SortedIndex:
    """The pairs of a group of tokens, cut into chunks; int32 but for the keys, which may have 16 bits.

    A row is one chunk under one index head: row = head * num_chunks + chunk.

    keys [heads, tokens, slots]: row * segments + segment, or -1 for a slot that selects nothing.
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
    keys = tl.where(segments >= 0, rows[:, None] * num_segments + segments, -1)
    first_pair = tl.program_id(2).to(tl.int64) * group_pairs
    tl.store(keys_ptr + first_pair + places, keys.to(keys_ptr.dtype.element_ty), mask=inside)


@kernel
def _items(
    offsets_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    num_segments,
    PAIRS_PER_ITEM: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Where the items of a row's segments begin, and those of segments that have several."""
    row = tl.program_id(0)
    offsets_ptr += row * num_segments
    item_offsets_ptr += row * (num_segments + 1)
    split_offsets_ptr += row * (num_segments + 1)
    num_items = 0
    num_splits = 0
    for start in range(0, num_segments, SEGMENTS):
        segments = start + tl.arange(0, SEGMENTS)
        inside = segments < num_segments
        pairs = tl.load(offsets_ptr + segments + 1, mask=inside, other=0)
        pairs -= tl.load(offsets_ptr + segments, mask=inside, other=0)
        items = (pairs + PAIRS_PER_ITEM - 1) // PAIRS_PER_ITEM
        splits = tl.where(items > 1, items, 0)
        num_items = store_offsets(item_offsets_ptr, segments, inside, num_items, items)
        num_splits = store_offsets(split_offsets_ptr, segments, inside, num_splits, splits)
    tl.store(item_offsets_ptr + num_segments, num_items)
    tl.store(split_offsets_ptr + num_segments, num_splits)


@kernel
def _pairs(
    sorted_ptr,
    places_ptr,
    offsets_ptr,
    item_offsets_ptr,
    pairs_ptr,
    item_segment_ptr,
    num_pairs,
    head_pairs,
    chunk_pairs,
    num_slots,
    num_segments,
    max_items,
    PAIRS_PER_ITEM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """From keys in order and where they were: the pairs; and the first pair of an item names its segment."""
    sorted_place = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = sorted_place < num_pairs
    place = tl.load(places_ptr + sorted_place, mask=inside, other=0).to(tl.int32)
    chunk_place = place % head_pairs % chunk_pairs
    pair = (chunk_place // num_slots << SLOT_BITS) | chunk_place % num_slots
    tl.store(pairs_ptr + sorted_place, pair, mask=inside)
    key = tl.load(sorted_ptr + sorted_place, mask=inside, other=-1).to(tl.int32)
    chosen = key >= 0
    rank = sorted_place - tl.load(offsets_ptr + key, mask=chosen, other=0)
    starts_item = chosen & (rank % PAIRS_PER_ITEM == 0)
    row, segment = key // num_segments, key % num_segments
    item = tl.load(item_offsets_ptr + row * (num_segments + 1) + segment, mask=starts_item, other=0)
    item += rank // PAIRS_PER_ITEM
    tl.store(item_segment_ptr + row.to(tl.int64) * max_items + item, segment, mask=starts_item)


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
    num_rows = num_heads * num_chunks
    num_keys = num_rows * num_segments
    dtype = torch.int16 if num_keys <= MAX_INT16 else torch.int32
    keys = block_indices.new_empty(num_heads, num_tokens, num_slots, dtype=dtype)
    slots = min(1 << (num_slots - 1).bit_length(), MAX_SLOTS_IN_TILE)
    tokens = PAIRS_IN_TILE // slots
    num_sequences = cu_seqlens_q.numel() - 1
    _keys[-(-num_tokens // tokens), -(-num_slots // slots), num_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, keys, first_token, 0, num_tokens, chunk_tokens,
        block_indices.stride(0), num_slots, num_sequences, search_steps(num_sequences), num_segments,
        num_chunks, 0, num_tokens * num_slots, BLOCK_SIZE=block_size, TOKENS=tokens, SLOTS=slots,
    )  # fmt: skip
    in_order, places = torch.sort(keys.flatten(), stable=True)
    every = torch.arange(num_keys + 1, dtype=dtype, device=keys.device)
    offsets = torch.searchsorted(in_order, every, out_int32=True)

    def int32(*shape: int) -> torch.Tensor:
        return block_indices.new_empty(shape)

    index = SortedIndex(
        keys=keys,
        pairs=int32(keys.numel()),
        offsets=offsets,
        item_offsets=int32(num_rows, num_segments + 1),
        split_offsets=int32(num_rows, num_segments + 1),
        item_segment=int32(num_rows, max_items),
    )
    _items[(num_rows,)](
        offsets, index.item_offsets, index.split_offsets, num_segments, PAIRS_PER_ITEM=pairs_per_item,
        SEGMENTS=SEGMENTS_IN_TILE,
    )  # fmt: skip
    _pairs[(-(-keys.numel() // PAIRS_IN_TILE),)](
        in_order, places, offsets, index.item_offsets, index.pairs, index.item_segment, keys.numel(),
        num_tokens * num_slots, chunk_tokens * num_slots, num_slots, num_segments, max_items,
        PAIRS_PER_ITEM=pairs_per_item, PAIRS=PAIRS_IN_TILE,
    )  # fmt: skip
    return index

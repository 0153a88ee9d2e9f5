"""Inversion of block_indices in an order that never varies: for each KV block, its pairs by token and slot.

The forward pass gives every pair's result a place of its own and may take pairs in any order. Gradients of
keys are sums over a block's pairs, so here the order is part of the answer. A stable counting sort, in four
launches, without host synchronisation or atomics:

1. rank: a program walks a strip of consecutive pairs, a tile at a time; in registers it sorts the tile by
   segment and place, which ranks every pair among the strip's of its segment;
2. strips: how many pairs of a segment come before each strip, and how many there are;
3. items: where each segment's pairs, and the work items cut from them, begin;
4. pairs: each goes to its segment's begin + those of strips before + its rank.

A strip is longer the more segments there are, so that counters are a third of the pairs at most.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fsa_core.backward_plan import PAIRS_A_COUNTER
from fsa_core.kernels import hopper
from fsa_core.kernels.index import SEGMENTS_IN_TILE, larger, store_offsets
from fsa_core.kernels.launch import Kernel, kernel, multiprocessors, sorting_warps
from fsa_core.kernels.primitives import blocks_of_tokens
from fsa_core.kernels.replay import Memory
from fsa_core.plan import SLOT_BITS
from fsa_core.sizes import search_steps

PAIRS_IN_TILE = 1024
# Of a multiprocessor: as many warps as there are registers for.
STRIPS_AT_ONCE = 8
# Of the counters, a program's: enough loads under way at once, enough programs.
STRIPS_IN_TILE = 64
SEGMENTS_IN_COLUMN = 32


@dataclass(frozen=True, slots=True)
class SortedIndex:
    """Buffers of the pairs of a group of tokens, cut into chunks; all int32. Every group reuses them.

    A row is one chunk under one index head: row = head * chunks + chunk.

    ranks [heads, tokens, slots]: the pair's place among its strip's of its segment, -1 for a slot that
    selects nothing.
    pairs [heads, tokens * slots]: token << slot_bits | slot, the token counted from the chunk's first; the
    pairs of a row by segment, and then by token and slot.
    counts [rows, strips, segments]: of each segment, the pairs in the strips before.
    offsets [rows, segments + 1]: where each row's segments begin in all ``pairs``.
    item_offsets [rows, segments + 1]: the first work item of each segment; the last is how many there are.
    split_offsets [rows, segments + 1]: the same, counting only segments of more than one item.
    item_segment [rows, max_items]: the segment that an item belongs to.
    """

    ranks: torch.Tensor
    pairs: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    item_offsets: torch.Tensor
    split_offsets: torch.Tensor
    item_segment: torch.Tensor


def new_sorted_index(
    memory: Memory,
    *,
    num_heads: int,
    num_tokens: int,
    chunk_tokens: int,
    num_slots: int,
    num_segments: int,
    max_items: int,
) -> SortedIndex:
    """Buffers of groups of up to ``num_tokens``."""

    def int32(*shape: int) -> torch.Tensor:
        return memory.new_empty(*shape, dtype=torch.int32)

    num_rows = num_heads * -(-num_tokens // chunk_tokens)
    strips, _ = _strips_of(chunk_tokens * num_slots, num_segments, num_rows, memory.device)
    return SortedIndex(
        ranks=int32(num_heads, num_tokens, num_slots),
        pairs=int32(num_heads, num_tokens * num_slots),
        counts=int32(num_rows, strips, num_segments),
        offsets=int32(num_rows, num_segments + 1),
        item_offsets=int32(num_rows, num_segments + 1),
        split_offsets=int32(num_rows, num_segments + 1),
        item_segment=int32(num_rows, max_items),
    )


def _strips_of(pairs: int, num_segments: int, num_rows: int, device: torch.device) -> tuple[int, int]:
    """How many strips each of ``num_rows`` chunks of ``pairs`` is, and their tiles.

    As short as counters allow, or up to twice as long if that saves a round that few strips would have.
    """
    tiles = -(-pairs // PAIRS_IN_TILE)
    shortest = min(-(-num_segments * PAIRS_A_COUNTER // PAIRS_IN_TILE), tiles)
    at_once = STRIPS_AT_ONCE * multiprocessors(device)

    def tiles_in_turn(strip_tiles: int) -> int:
        return -(-(-(-tiles // strip_tiles) * num_rows) // at_once) * strip_tiles

    strip_tiles = min(range(shortest, min(2 * shortest, tiles) + 1), key=tiles_in_turn)
    return -(-tiles // strip_tiles), strip_tiles


@triton.jit
def _load_chosen(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    places,
    num_pairs,
    first_token,
    num_slots,
    num_sequences,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
):
    """The segments that pairs ``places`` of a chunk chose, -1 for none; the chunk has ``num_pairs``.

    Ids that name no block of the token's sequence select nothing, so that no index can reach memory it
    should not.
    """
    blocks = tl.load(indices_ptr + places, mask=places < num_pairs, other=-1)
    first, num_blocks = blocks_of_tokens(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token + places // num_slots, num_sequences, search_steps,
        BLOCK_SIZE,
    )  # fmt: skip
    return tl.where((blocks >= 0) & (blocks < num_blocks), first + blocks, -1)


@kernel
def _rank(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    ranks_ptr,
    counts_ptr,
    first_token,
    num_tokens,
    chunk_tokens,
    first_head,
    head_step,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    group_pairs,
    strip_tiles,
    BLOCK_SIZE: tl.constexpr,
    LOG_PAIRS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEY_DTYPE: tl.constexpr,
):
    """Ranks the pairs of a strip, and counts them by segment: counts [rows, strips, segments]."""
    strip, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_place = chunk * chunk_tokens * num_slots
    first_token += chunk * chunk_tokens
    num_pairs = tl.minimum(num_tokens - chunk * chunk_tokens, chunk_tokens) * num_slots
    indices_ptr += (first_head + head * head_step) * head_stride + tl.cast(first_token, tl.int64) * num_slots
    ranks_ptr += head * group_pairs + first_place
    counts_ptr += ((head * num_chunks + chunk) * tl.num_programs(0) + strip) * num_segments
    for start in range(0, num_segments, SEGMENTS):
        segments = start + tl.arange(0, SEGMENTS)
        tl.store(counts_ptr + segments, tl.zeros((SEGMENTS,), tl.int32), mask=segments < num_segments)
    size: tl.constexpr = 1 << LOG_PAIRS
    line = tl.arange(0, size)
    for tile in range(strip * strip_tiles, (strip + 1) * strip_tiles):
        chosen = _load_chosen(
            indices_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile * size + line, num_pairs, first_token,
            num_slots, num_sequences, search_steps, BLOCK_SIZE,
        )  # fmt: skip
        # What selects nothing comes last.
        keys = tl.where(chosen >= 0, chosen, num_segments).to(KEY_DTYPE)
        keys = tl.sort((keys << LOG_PAIRS) | line)
        segments = (keys >> LOG_PAIRS).to(tl.int32)
        places = tile * size + (keys & (size - 1)).to(tl.int32)
        is_first = (line == 0) | (segments != tl.gather(segments, tl.maximum(line - 1, 0), 0))
        is_last = (line == size - 1) | (segments != tl.gather(segments, tl.minimum(line + 1, size - 1), 0))
        first_line = tl.associative_scan(tl.where(is_first, line, 0), 0, larger)
        exists = segments < num_segments
        # The counters pass from thread to thread, tile by tile.
        tl.debug_barrier()
        ranks = tl.load(counts_ptr + segments, mask=exists, other=0) + line - first_line
        tl.store(ranks_ptr + places, tl.where(exists, ranks, -1), mask=places < num_pairs)
        tl.debug_barrier()
        tl.store(counts_ptr + segments, ranks + 1, mask=exists & is_last)


@kernel
def _strips(
    counts_ptr,
    offsets_ptr,
    num_strips,
    num_segments,
    STRIPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Turns counts of strips into those of the strips before; offsets [rows, segments + 1] become sums."""
    segments = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    row = tl.program_id(1)
    inside = segments < num_segments
    counts_ptr += tl.cast(row, tl.int64) * num_strips * num_segments
    total = tl.zeros((SEGMENTS,), tl.int32)
    for start in range(0, num_strips, STRIPS):
        strips = start + tl.arange(0, STRIPS)
        mask = (strips < num_strips)[:, None] & inside[None, :]
        places = strips.to(tl.int64)[:, None] * num_segments + segments[None, :]
        counts = tl.load(counts_ptr + places, mask=mask, other=0)
        tl.store(counts_ptr + places, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(offsets_ptr + row * (num_segments + 1) + segments, total, mask=inside)


@kernel
def _items(
    offsets_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    num_segments,
    num_chunks,
    chunk_pairs,
    group_pairs,
    PAIRS_PER_ITEM: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """From how many pairs segments have: where those, their items and the items of several begin."""
    row = tl.program_id(0)
    offsets_ptr += row * (num_segments + 1)
    item_offsets_ptr += row * (num_segments + 1)
    split_offsets_ptr += row * (num_segments + 1)
    first_pair = row // num_chunks * group_pairs + row % num_chunks * chunk_pairs
    num_items = 0
    num_splits = 0
    for start in range(0, num_segments, SEGMENTS):
        segments = start + tl.arange(0, SEGMENTS)
        inside = segments < num_segments
        pairs = tl.load(offsets_ptr + segments, mask=inside, other=0)
        items = (pairs + PAIRS_PER_ITEM - 1) // PAIRS_PER_ITEM
        splits = tl.where(items > 1, items, 0)
        first_pair = store_offsets(offsets_ptr, segments, inside, first_pair, pairs)
        num_items = store_offsets(item_offsets_ptr, segments, inside, num_items, items)
        num_splits = store_offsets(split_offsets_ptr, segments, inside, num_splits, splits)
    tl.store(offsets_ptr + num_segments, first_pair)
    tl.store(item_offsets_ptr + num_segments, num_items)
    tl.store(split_offsets_ptr + num_segments, num_splits)


@kernel
def _pairs(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    ranks_ptr,
    counts_ptr,
    offsets_ptr,
    item_offsets_ptr,
    pairs_ptr,
    item_segment_ptr,
    first_token,
    num_tokens,
    chunk_tokens,
    first_head,
    head_step,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    group_pairs,
    strip_tiles,
    num_strips,
    max_items,
    BLOCK_SIZE: tl.constexpr,
    PAIRS_PER_ITEM: tl.constexpr,
    PAIRS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
):
    """Writes the pairs in order; and the first pair of an item names its segment."""
    tile, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token += chunk * chunk_tokens
    num_pairs = tl.minimum(num_tokens - chunk * chunk_tokens, chunk_tokens) * num_slots
    indices_ptr += (first_head + head * head_step) * head_stride + tl.cast(first_token, tl.int64) * num_slots
    ranks_ptr += head * group_pairs + chunk * chunk_tokens * num_slots
    row = head * num_chunks + chunk
    counts_ptr += (row * num_strips + tile // strip_tiles) * num_segments
    offsets_ptr += row * (num_segments + 1)
    item_offsets_ptr += row * (num_segments + 1)
    places = tile * PAIRS + tl.arange(0, PAIRS)
    segments = _load_chosen(
        indices_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, places, num_pairs, first_token, num_slots,
        num_sequences, search_steps, BLOCK_SIZE,
    )  # fmt: skip
    chosen = segments >= 0
    ranks = tl.load(ranks_ptr + places, mask=chosen, other=0)
    ranks += tl.load(counts_ptr + segments, mask=chosen, other=0)
    pairs = (places // num_slots << SLOT_BITS) | places % num_slots
    tl.store(pairs_ptr + tl.load(offsets_ptr + segments, mask=chosen, other=0) + ranks, pairs, mask=chosen)
    starts_item = chosen & (ranks % PAIRS_PER_ITEM == 0)
    items = tl.load(item_offsets_ptr + segments, mask=starts_item, other=0) + ranks // PAIRS_PER_ITEM
    tl.store(item_segment_ptr + row * max_items + items, segments, mask=starts_item)


def _ranking(
    device: torch.device, num_slots: int, log_pairs: int, is_wide: bool, tiles: int
) -> tuple[Kernel, dict[str, Any]]:
    """The kernel that ranks on this device, and the constants that it alone has."""
    if hopper.runs_on(device) and not is_wide:
        from fsa_core.kernels import hopper_ranks

        return hopper_ranks.rank, {"LOG_ROW": hopper_ranks.log_row(num_slots, log_pairs), "num_warps": 1}
    key_dtype = tl.int64 if is_wide else tl.int32
    return _rank, {
        "SEGMENTS": SEGMENTS_IN_TILE, "KEY_DTYPE": key_dtype, "num_warps": sorting_warps(device, tiles),
    }  # fmt: skip


def sort_pairs(
    index: SortedIndex,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    first_token: int,
    num_tokens: int,
    chunk_tokens: int,
    first_head: int,
    head_step: int,
    block_size: int,
    pairs_per_item: int,
    slot_bits: int = SLOT_BITS,
) -> None:
    """Fills ``index`` for ``num_tokens`` query tokens from ``first_token``, in chunks of ``chunk_tokens``.

    ``block_indices`` is int32 [index_heads, total_q, slots], contiguous; head ``i`` of the index is its head
    first_head + i * head_step.
    """
    num_heads, group_tokens, num_slots = index.ranks.shape
    num_rows, _, num_segments = index.counts.shape
    num_chunks, chunk_pairs = num_rows // num_heads, chunk_tokens * num_slots
    num_strips, strip_tiles = _strips_of(chunk_pairs, num_segments, num_rows, block_indices.device)
    num_sequences = cu_seqlens_q.numel() - 1
    sizes = (
        first_token, num_tokens, chunk_tokens, first_head, head_step, block_indices.stride(0), num_slots,
        num_sequences, search_steps(num_sequences), num_segments, num_chunks, group_tokens * num_slots,
        strip_tiles,
    )  # fmt: skip
    log_pairs = PAIRS_IN_TILE.bit_length() - 1
    is_wide = (num_segments + 1) << log_pairs > 2**31
    tiles = num_strips * strip_tiles * num_rows
    rank, own = _ranking(block_indices.device, num_slots, log_pairs, is_wide, tiles)
    rank[num_strips, num_chunks, num_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, index.ranks, index.counts, *sizes, BLOCK_SIZE=block_size,
        LOG_PAIRS=log_pairs, **own,
    )  # fmt: skip
    _strips[-(-num_segments // SEGMENTS_IN_COLUMN), num_rows](
        index.counts, index.offsets, num_strips, num_segments, STRIPS=STRIPS_IN_TILE,
        SEGMENTS=SEGMENTS_IN_COLUMN,
    )  # fmt: skip
    _items[(num_rows,)](
        index.offsets, index.item_offsets, index.split_offsets, num_segments, num_chunks, chunk_pairs,
        group_tokens * num_slots, PAIRS_PER_ITEM=pairs_per_item, SEGMENTS=SEGMENTS_IN_TILE,
    )  # fmt: skip
    _pairs[-(-chunk_pairs // PAIRS_IN_TILE), num_chunks, num_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, index.ranks, index.counts, index.offsets,
        index.item_offsets, index.pairs, index.item_segment, *sizes, num_strips, index.item_segment.shape[1],
        BLOCK_SIZE=block_size, PAIRS_PER_ITEM=pairs_per_item, PAIRS=PAIRS_IN_TILE, SLOT_BITS=slot_bits,
    )  # fmt: skip

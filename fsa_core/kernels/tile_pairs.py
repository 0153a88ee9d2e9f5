"""Two neighbouring query tiles as one: what is walked is what either shares, each with its own tokens' masks.

A program for Hopper takes 128 rows, and a query tile of 64 is half of that where a larger one would be sorted
at too high a price (``tiles.QueryTile.is_half``). Each half of such a program has the list that it would have
alone, and passes over what is the other's, so that its bits are those of the tile alone.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.kernels.primitives import first_segment
from fsa_core.kernels.tile_tokens import tile_keys, tile_tokens, tiles_of
from fsa_core.plan import Group
from fsa_core.problem import Problem
from fsa_core.sizes import search_steps
from fsa_core.tiles import QueryTile

NO_BLOCK = tl.constexpr(2147483647)
# Of a list at a time, each held against as many of the other.
ENTRIES = tl.constexpr(32)


@triton.jit
def _write_joined(
    blocks_ptr,
    masks_ptr,
    num_blocks,
    others_ptr,
    other_masks_ptr,
    num_others,
    joined_blocks_ptr,
    joined_masks_ptr,
    joined_other_masks_ptr,
    num_seen,
    BLOCK_SIZE: tl.constexpr,
    WITH_BOTH: tl.constexpr,
):
    """Writes a list's entries to their places in the joint list; WITH_BOTH: those too that both lists have.

    Returns how many are in both, and how many of those written are of a block that is seen whole.
    """
    entry = tl.arange(0, ENTRIES)
    num_both, num_whole = 0, 0
    for first in range(0, num_blocks, ENTRIES):
        exists = first + entry < num_blocks
        blocks = tl.load(blocks_ptr + first + entry, mask=exists, other=NO_BLOCK)
        before = tl.zeros((ENTRIES,), tl.int32)
        twin = tl.full((ENTRIES,), -1, tl.int32)
        for first_other in range(0, num_others, ENTRIES):
            is_other = first_other + entry < num_others
            others = tl.load(others_ptr + first_other + entry, mask=is_other, other=NO_BLOCK)
            before += tl.sum((others[None, :] < blocks[:, None]).to(tl.int32), 1)
            is_same = (others[None, :] == blocks[:, None]) & is_other[None, :]
            twin = tl.maximum(twin, tl.max(tl.where(is_same, (first_other + entry)[None, :], -1), 1))
        is_both = exists & (twin >= 0)
        both = tl.cumsum(is_both.to(tl.int32), 0)
        # Those in both lists count once.
        place = first + entry + before - (num_both + both - is_both.to(tl.int32))
        is_written = exists if WITH_BOTH else exists & (twin < 0)
        tl.store(joined_blocks_ptr + place, blocks, mask=is_written)
        tl.store(
            joined_masks_ptr + place,
            tl.load(masks_ptr + first + entry, mask=exists, other=0),
            mask=is_written,
        )
        other_masks = tl.load(other_masks_ptr + twin, mask=is_both, other=0)
        tl.store(joined_other_masks_ptr + place, other_masks, mask=is_written)
        num_whole += tl.sum((is_written & ((blocks + 1) * BLOCK_SIZE <= num_seen)).to(tl.int32), 0)
        num_both += tl.sum(is_both.to(tl.int32), 0)
    return num_both, num_whole


@kernel
def _join_lists(
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    joined_blocks_ptr,
    joined_masks_ptr,
    joined_counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    tiles_of_head,
    first_pair,
    pairs_of_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Merges two lists of ascending blocks. Of a tile that the group has none of, the list is empty.

    blocks int32 [index heads, pairs, 2 * MAX_SHARED], masks int64 [index heads, pairs, 2, 2 * MAX_SHARED]: of
    each block which tokens of the first tile chose it, and which of the second; counts as of ``Agreement``.
    """
    pair, head = first_pair + tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = head * pairs_of_head + tl.program_id(0)
    joined_counts_ptr += place * 2
    sequence, first, q_end = tile_tokens(pair, cu_seqlens_q_ptr, num_sequences, search_steps, 2 * TOKENS)
    if first >= q_end:
        tl.store(joined_counts_ptr, 0)
        tl.store(joined_counts_ptr + 1, 0)
        return
    _blocks, num_seen = tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    in_sequence = (first - tl.load(cu_seqlens_q_ptr + sequence)) // TOKENS
    tile = first_segment(cu_seqlens_q_ptr, sequence, TOKENS) + in_sequence - first_tile
    has_a = (tile >= 0) & (tile < num_tiles)
    has_b = (tile + 1 >= 0) & (tile + 1 < num_tiles) & (first + TOKENS < q_end)
    list_place = head * tiles_of_head + tile
    num_a = tl.load(counts_ptr + list_place * 2 + 1, mask=has_a, other=0)
    num_b = tl.load(counts_ptr + list_place * 2 + 3, mask=has_b, other=0)
    a_ptr, b_ptr = list_place * MAX_SHARED, (list_place + 1) * MAX_SHARED
    joined_blocks_ptr += place * (2 * MAX_SHARED)
    joined_masks_ptr += place * (4 * MAX_SHARED)
    blocks_a_ptr, blocks_b_ptr = blocks_ptr + a_ptr, blocks_ptr + b_ptr
    masks_a_ptr, masks_b_ptr = masks_ptr + a_ptr, masks_ptr + b_ptr
    second_masks_ptr = joined_masks_ptr + 2 * MAX_SHARED
    # What is in both is written with the first list. A block whole for the first token of all is so for all.
    num_both, whole_a = _write_joined(
        blocks_a_ptr, masks_a_ptr, num_a, blocks_b_ptr, masks_b_ptr, num_b, joined_blocks_ptr,
        joined_masks_ptr, second_masks_ptr, num_seen, BLOCK_SIZE, True,
    )  # fmt: skip
    _num_both, whole_b = _write_joined(
        blocks_b_ptr, masks_b_ptr, num_b, blocks_a_ptr, masks_a_ptr, num_a, joined_blocks_ptr,
        second_masks_ptr, joined_masks_ptr, num_seen, BLOCK_SIZE, False,
    )  # fmt: skip
    tl.store(joined_counts_ptr, whole_a + whole_b)
    tl.store(joined_counts_ptr + 1, num_a + num_b - num_both)


def join_lists(
    agreement: Agreement,
    problem: Problem,
    tile: QueryTile,
    group: Group,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    """Joins the lists of a group's tiles, two by two, in the buffers that ``agreement`` has for that.

    They are blocks, masks and counts as of ``_join_lists``; how many there are, ``tiles_of`` twice as many
    tokens says.
    """
    p, joined = problem, agreement.joined
    assert joined is not None
    first_tile, num_tiles = tiles_of(p, tile.tokens, group)
    first_pair, num_asked = tiles_of(p, 2 * tile.tokens, group)
    _joining(p, tile)[num_asked, group.num_index_heads](
        agreement.blocks, agreement.masks, agreement.counts, *joined, cu_seqlens_q, cu_seqlens_k,
        p.num_sequences, search_steps(p.num_sequences), first_tile, num_tiles, agreement.counts.shape[1],
        first_pair, joined[2].shape[1],
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _joining(problem: Problem, tile: QueryTile) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _join_lists.bind(
        BLOCK_SIZE=problem.block_size, TOKENS=tile.tokens, MAX_SHARED=tile.max_shared, CAUSAL=problem.causal,
        num_warps=1,
    )  # fmt: skip

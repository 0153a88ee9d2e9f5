"""Two neighbouring query tiles as one: what is walked is what either shares, each with its own tokens' masks.

A program for Hopper takes 128 rows, and a query tile of 64 is half of that where a larger one would be sorted
at too high a price (``plan.QueryTile.is_half``). Each half of such a program has the list that it would have
alone, and passes over what is the other's, so that its bits are those of the tile alone.
"""

from functools import lru_cache

import torch
import triton.language as tl

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.kernels.primitives import first_segment
from fsa_core.kernels.tile_tokens import tile_keys, tile_tokens, tiles_of
from fsa_core.plan import Group, QueryTile, search_steps
from fsa_core.problem import Problem

NO_BLOCK = tl.constexpr(2147483647)


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
    at_a, at_b, num_joined, num_whole = 0, 0, 0, 0
    block_a = tl.load(blocks_ptr + a_ptr, mask=num_a > 0, other=NO_BLOCK)
    block_b = tl.load(blocks_ptr + b_ptr, mask=num_b > 0, other=NO_BLOCK)
    while (at_a < num_a) | (at_b < num_b):
        block = tl.minimum(block_a, block_b)
        of_a, of_b = block_a == block, block_b == block
        mask_a = tl.load(masks_ptr + a_ptr + at_a, mask=of_a, other=0)
        mask_b = tl.load(masks_ptr + b_ptr + at_b, mask=of_b, other=0)
        tl.store(joined_blocks_ptr + num_joined, block)
        tl.store(joined_masks_ptr + num_joined, mask_a)
        tl.store(joined_masks_ptr + 2 * MAX_SHARED + num_joined, mask_b)
        # Whole for the first token of all, and so for every one.
        num_whole += ((block + 1) * BLOCK_SIZE <= num_seen).to(tl.int32)
        num_joined += 1
        at_a += of_a.to(tl.int32)
        at_b += of_b.to(tl.int32)
        block_a = tl.load(blocks_ptr + a_ptr + at_a, mask=at_a < num_a, other=NO_BLOCK)
        block_b = tl.load(blocks_ptr + b_ptr + at_b, mask=at_b < num_b, other=NO_BLOCK)
    tl.store(joined_counts_ptr, num_whole)
    tl.store(joined_counts_ptr + 1, num_joined)


def join_lists(
    agreement: Agreement,
    problem: Problem,
    tile: QueryTile,
    group: Group,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], int, int]:
    """The lists of a group's tiles, two by two, as kernels take them; the first pair, and how many are asked.

    The lists are blocks, masks and counts as of ``_join_lists``, in buffers that ``agreement`` has for them.
    """
    p, joined = problem, agreement.joined
    assert joined is not None
    first_tile, num_tiles = tiles_of(p, tile.tokens, group)
    first_pair, num_asked = tiles_of(p, 2 * tile.tokens, group)
    counts = joined[2]
    _joining(p, tile)[num_asked, group.num_index_heads](
        agreement.blocks, agreement.masks, agreement.counts, *joined, cu_seqlens_q, cu_seqlens_k,
        p.num_sequences, search_steps(p.num_sequences), first_tile, num_tiles, agreement.counts.shape[1],
        first_pair, counts.shape[1],
    )  # fmt: skip
    return joined, first_pair, num_asked


@lru_cache(maxsize=1024)
def _joining(problem: Problem, tile: QueryTile) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _join_lists.bind(
        BLOCK_SIZE=problem.block_size, TOKENS=tile.tokens, MAX_SHARED=tile.max_shared, CAUSAL=problem.causal,
        num_warps=1,
    )  # fmt: skip

"""What a query tile's tokens share: the blocks that enough of them chose, and what is left of block_indices.

One launch, a program a tile. Where a tile's tokens share a row of indices, the list is that row. What a tile
lists depends on nothing but its own tokens.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.index import LEFT, Inversion, invert
from fsa_core.kernels.launch import BoundKernel, kernel, sorting_warps
from fsa_core.kernels.tile_tokens import tile_keys, tile_tokens, tiles_of
from fsa_core.plan import ORDERED_TILES, STEP_BINS, ForwardPlan, Group
from fsa_core.problem import Problem
from fsa_core.sizes import power_of_two, search_steps
from fsa_core.tiles import FEW_LEFT, MAX_REGISTERS, QueryTile

# Of a thread where a warp sorts a tile: more, and too few tiles are on a multiprocessor at once.
MAX_SORTING_REGISTERS = 128


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the tiles of a group of tokens share, and what is left.

    blocks int32, masks int64 [index heads, tiles, max_shared]: block ids, those that every token of the tile
    may see whole before the others, and which of the tile's tokens chose each (bit t: the t-th). counts int32
    [index heads, tiles, 2]: how many of them are seen whole, and how many there are.
    leftover int32 [index heads, tokens, slots]: block_indices without the shared ones, which are -1.
    joined: for what ``tile_pairs.join_lists`` makes of them, where tiles are taken two by two.
    order: for that of ``tile_order.ordered_lists``, and where in it each class of tiles begins.
    kept_left int32 [LEFT + 1]: of what is kept its last says whether anything is left; else the index does.
        None too where tiles leave nothing.
    """

    blocks: torch.Tensor
    masks: torch.Tensor
    counts: torch.Tensor
    leftover: torch.Tensor
    joined: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    order: tuple[torch.Tensor, torch.Tensor] | None
    kept_left: torch.Tensor | None = None


@triton.jit
def _join(block_a, mask_a, count_a, block_b, mask_b, count_b):
    """Runs of one block, from the left: the union of their masks and how many they are."""
    same = block_a == block_b
    return block_b, tl.where(same, mask_a | mask_b, mask_b), tl.where(same, count_a + count_b, count_b)


@triton.jit
def _spread(block_a, count_a, block_b, count_b):
    """Runs of one block, from the right: the count at their end."""
    return block_b, tl.where(block_a == block_b, tl.maximum(count_a, count_b), count_b)


@kernel
def _agree(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    leftover_ptr,
    left_ptr,
    first_token,
    num_tokens,
    head_stride,
    leftover_stride,
    num_slots,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_index_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LOG_TOKENS: tl.constexpr,
    LOG_SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    FEW_LEFT: tl.constexpr,
    MOST_BLOCKS: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    WITH_LEFTOVER: tl.constexpr,
    WITH_INDEX: tl.constexpr,
):
    """Sorts a tile's (block, token, slot) triples, so that the tokens that chose a block are a run.

    WITH_INDEX says in ``left``, as ``index.Inversion`` has it, whether a tile left anything.
    """
    tile = first_tile + tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    tile_place = head * num_tiles + tl.program_id(0)
    if first >= q_end:
        tl.store(counts_ptr + tile_place * 2, 0)
        tl.store(counts_ptr + tile_place * 2 + 1, 0)
        return
    num_blocks, num_seen = tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    size: tl.constexpr = 1 << (LOG_TOKENS + LOG_SLOTS)
    place = tl.arange(0, size)
    token, slot = place >> LOG_SLOTS, place & ((1 << LOG_SLOTS) - 1)
    inside = (token < TOKENS) & (first + token < q_end) & (slot < num_slots)
    # All that the tile has lies at small offsets from its first.
    first_id = first.to(tl.int64) * num_slots
    id_place = token * num_slots + slot
    indices_ptr += (first_index_head + head) * head_stride + first_id
    ids = tl.load(indices_ptr + id_place, mask=inside, other=-1)
    # Ids that name no block of the sequence select nothing.
    valid = inside & (ids >= 0) & (ids < num_blocks)
    key = tl.sort(tl.where(valid, (ids << (LOG_TOKENS + LOG_SLOTS)) | place, 2147483647))
    exists = key != 2147483647
    block, place_of = key >> (LOG_TOKENS + LOG_SLOTS), key & (size - 1)
    token_of, slot_of = place_of >> LOG_SLOTS, place_of & ((1 << LOG_SLOTS) - 1)
    # What is scanned takes registers, and moves between threads word by word.
    mask_dtype: tl.constexpr = tl.uint32 if TOKENS <= 32 else tl.uint64
    bit = tl.where(exists, tl.full((size,), 1, mask_dtype) << token_of.to(mask_dtype), 0)
    _, mask, count = tl.associative_scan((block, bit, exists.to(tl.int32)), 0, _join)
    _, total = tl.associative_scan((block, count), 0, _spread, reverse=True)
    is_shared = exists & (total >= MIN_TOKENS)
    # A few partials cost more than a few blocks that hardly any of the tokens chose.
    num_left = tl.sum((exists & ~is_shared).to(tl.int32), 0)
    num_listed = tl.sum((exists & (count == total)).to(tl.int32), 0)
    all_shared = (num_left * FEW_LEFT < tl.sum(exists.to(tl.int32), 0)) & (num_listed <= MOST_BLOCKS)
    is_shared |= exists & all_shared
    is_last = is_shared & (count == total)
    list_place = tl.cumsum(is_last.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + tile_place * MAX_SHARED + list_place, block, mask=is_last)
    tl.store(masks_ptr + tile_place * MAX_SHARED + list_place, mask.to(tl.int64), mask=is_last)
    is_whole = is_last & ((block + 1) * BLOCK_SIZE <= num_seen)
    tl.store(counts_ptr + tile_place * 2, tl.sum(is_whole.to(tl.int32), 0))
    tl.store(counts_ptr + tile_place * 2 + 1, tl.sum(is_last.to(tl.int32), 0))
    if WITH_LEFTOVER:
        # A tile at the border of a group of tokens is seen by both groups; each keeps its own tokens.
        first -= first_token
        leftover_ptr += head * leftover_stride + first.to(tl.int64) * num_slots
        here = inside & (first + token >= 0) & (first + token < num_tokens)
        nothing = tl.full((size,), -1, tl.int32)
        if all_shared:
            tl.store(leftover_ptr + id_place, nothing, mask=here)
        else:
            tl.store(leftover_ptr + id_place, nothing, mask=here & ~valid)
            here = exists & (first + token_of >= 0) & (first + token_of < num_tokens)
            left = tl.where(is_shared, -1, block)
            tl.store(leftover_ptr + token_of * num_slots + slot_of, left, mask=here)
            if WITH_INDEX:
                tl.store(left_ptr + LEFT, 1, mask=num_left > 0)


@kernel
def _list_rows(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_index_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MAX_SHARED: tl.constexpr,
):
    """The list of a tile whose tokens share a row: that of its last token, which sees most, slot by slot."""
    tile = first_tile + tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    tile_place = head * num_tiles + tl.program_id(0)
    if first >= q_end:
        tl.store(counts_ptr + tile_place * 2, 0)
        tl.store(counts_ptr + tile_place * 2 + 1, 0)
        return
    num_blocks, num_seen = tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    slot = tl.arange(0, SLOTS)
    last = tl.minimum(first + TOKENS, q_end) - 1
    row_ptr = indices_ptr + (first_index_head + head) * head_stride + last.to(tl.int64) * num_slots
    ids = tl.load(row_ptr + slot, mask=slot < num_slots, other=-1)
    # Ids that name no block of the sequence select nothing.
    exists = (ids >= 0) & (ids < num_blocks)
    is_whole = exists & ((ids + 1) * BLOCK_SIZE <= num_seen)
    num_whole = tl.sum(is_whole.to(tl.int32), 0)
    # How many there are up to a slot, it included.
    whole = tl.cumsum(is_whole.to(tl.int32), 0)
    others = tl.cumsum(exists.to(tl.int32), 0) - whole
    list_place = tile_place * MAX_SHARED + tl.where(is_whole, whole, num_whole + others) - 1
    tl.store(blocks_ptr + list_place, ids, mask=exists)
    tl.store(masks_ptr + list_place, tl.full((SLOTS,), -1, tl.int64), mask=exists)
    tl.store(counts_ptr + tile_place * 2, num_whole)
    tl.store(counts_ptr + tile_place * 2 + 1, tl.sum(exists.to(tl.int32), 0))


class Maker(Protocol):
    """What makes tensors on its device."""

    @property
    def device(self) -> torch.device: ...

    def new_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor: ...

    def new_zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor: ...


def new_agreement(
    problem: Problem, plan: ForwardPlan, tile: QueryTile, memory: Maker, *, is_kept: bool = False
) -> Agreement:
    """Buffers of one group of tokens, as ``memory`` makes them; ``is_kept``: for more than one pass."""
    heads = plan.group_heads if plan.index_per_head else 1
    lists = (heads, plan.group_tiles, tile.max_shared)
    leftover_tokens = plan.group_tokens if plan.has_leftover else 0
    joined = None
    if tile.is_half and hopper.runs_on(memory.device):
        num_pairs, most = -(-plan.group_tokens // (2 * tile.tokens)) + plan.extra_tiles, 2 * tile.max_shared
        joined = (
            memory.new_empty(heads, num_pairs, most, dtype=torch.int32),
            memory.new_empty(heads, num_pairs, 2, most, dtype=torch.int64),
            memory.new_empty(heads, num_pairs, 2, dtype=torch.int32),
        )
    order = None
    if hopper.runs_on(memory.device):
        num_tiles = heads * plan.group_tiles
        programs = -(-num_tiles // ORDERED_TILES)
        order = (
            memory.new_empty(num_tiles, dtype=torch.int32),
            memory.new_empty(programs, STEP_BINS, dtype=torch.int32),
        )
    return Agreement(
        blocks=memory.new_empty(*lists, dtype=torch.int32),
        masks=memory.new_empty(*lists, dtype=torch.int64),
        counts=memory.new_empty(*lists[:2], 2, dtype=torch.int32),
        leftover=memory.new_empty(heads, leftover_tokens, problem.num_slots, dtype=torch.int32),
        joined=joined,
        order=order,
        kept_left=memory.new_zeros(LEFT.value + 1, dtype=torch.int32)
        if is_kept and leftover_tokens
        else None,
    )


def agree(
    agreement: Agreement,
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    inversion: Inversion | None,
) -> None:
    """Fills ``agreement`` for a group's tokens; tensors as in ``selected_attention_forward``.

    ``inversion``, of what is left, learns whether anything is.
    """
    p, steps = problem, search_steps(problem.num_sequences)
    first_tile, num_tiles = tiles_of(p, tile.tokens, group)
    if tile.is_row:
        _listing(p, tile)[num_tiles, group.num_index_heads](
            block_indices, cu_seqlens_q, cu_seqlens_k, agreement.blocks, agreement.masks, agreement.counts,
            block_indices.stride(0), p.num_slots, p.num_sequences, steps, first_tile,
            agreement.counts.shape[1], group.first_index_head,
        )  # fmt: skip
        return
    num_warps = sorting_warps(block_indices.device, num_tiles * group.num_index_heads)
    on_hopper = hopper.runs_on(block_indices.device)
    left = agreement.kept_left if inversion is None else inversion.left
    leaves = (plan.has_leftover, left is not None)
    left = agreement.counts if left is None else left
    agreeing = _agreeing_on_hopper(p, tile, leaves, num_warps > 1) if on_hopper else None
    agreeing = agreeing or _agreeing(p, tile, leaves, num_warps)
    agreeing[num_tiles, group.num_index_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, agreement.blocks, agreement.masks, agreement.counts,
        agreement.leftover, left, group.first_token, group.num_tokens, block_indices.stride(0),
        agreement.leftover.stride(0), p.num_slots, p.num_sequences, steps, first_tile,
        agreement.counts.shape[1], group.first_index_head,
    )  # fmt: skip


def index_pairs(
    inversion: Inversion,
    agreement: Agreement | None,
    problem: Problem,
    plan: ForwardPlan,
    group: Group,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    """Fills ``inversion`` with a group's pairs: those that its tiles left, or all if there are no tiles."""
    left = agreement is not None
    invert(
        inversion,
        block_indices if agreement is None else agreement.leftover,
        cu_seqlens_q,
        cu_seqlens_k,
        first_token=group.first_token,
        num_tokens=group.num_tokens,
        first_head=0 if left else group.first_index_head,
        num_heads=group.num_index_heads,
        chunk_tokens=plan.chunk_tokens,
        block_size=problem.block_size,
        pairs_per_item=plan.tile.pairs_per_item,
        causal=problem.causal,
        first_row_token=group.first_token if left else 0,
        mark_unused=not left and not plan.is_buffered,
        of_leftover=left,
    )


@lru_cache(maxsize=1024)
def _listing(problem: Problem, tile: QueryTile) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _list_rows.bind(
        BLOCK_SIZE=problem.block_size, TOKENS=tile.tokens, SLOTS=power_of_two(problem.num_slots),
        CAUSAL=problem.causal, MAX_SHARED=tile.max_shared,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _agreeing_on_hopper(
    problem: Problem, tile: QueryTile, leaves: tuple[bool, bool], is_alone: bool
) -> BoundKernel | None:
    """The kernel for Hopper alone, if it takes the tile."""
    from fsa_core.kernels import hopper_agreement

    num_warps = hopper_agreement.num_warps(problem, tile, is_alone)
    if not num_warps:
        return None
    constants = _agreeing_constants(problem, tile, *leaves)
    return hopper_agreement.agree.bind(
        **constants, SEARCHES=hopper_agreement.searches(problem, tile, is_alone), WARPS=num_warps,
        num_warps=num_warps, maxnreg=MAX_SORTING_REGISTERS,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _agreeing(problem: Problem, tile: QueryTile, leaves: tuple[bool, bool], num_warps: int) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _agree.bind(
        **_agreeing_constants(problem, tile, *leaves), num_warps=num_warps,
        maxnreg=MAX_SORTING_REGISTERS if num_warps == 1 else MAX_REGISTERS,
    )  # fmt: skip


def _agreeing_constants(
    problem: Problem, tile: QueryTile, with_leftover: bool, with_index: bool
) -> dict[str, int]:
    return {
        "BLOCK_SIZE": problem.block_size, "TOKENS": tile.tokens, "LOG_TOKENS": (tile.tokens - 1).bit_length(),
        "LOG_SLOTS": (problem.num_slots - 1).bit_length(), "CAUSAL": problem.causal,
        "MIN_TOKENS": tile.min_tokens, "FEW_LEFT": FEW_LEFT, "MOST_BLOCKS": tile.most_blocks,
        "MAX_SHARED": tile.max_shared, "WITH_LEFTOVER": with_leftover, "WITH_INDEX": with_index,
    }  # fmt: skip

"""What a query tile's tokens share: ``agreement._agree`` in Gluon, for its layouts.

A tile whose tokens agree chose few blocks. They are found one after the other, the least first, in less than
half of the instructions that it takes to sort all choices; the list is the same. Whether a tile is of that
kind shows after the first few; if not, all is sorted.
"""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fsa_core.kernels.hopper_sort import sort, to_neighbours
from fsa_core.kernels.index import LEFT
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.tile_tokens import tile_keys, tile_tokens
from fsa_core.problem import Problem
from fsa_core.sizes import power_of_two
from fsa_core.tiles import QueryTile

# Two warps sort a tile of more in four fifths of the time of one, if they are alone; in company in as much.
MANY = 512
# Choices of a tile from which on blocks are looked for one by one. So many are found first; then the search
# goes on while a block has been chosen by one in so many tokens, on the mean.
FEWEST_SEARCHED, FIRST_FOUND, SEARCH_WHILE = 512, gl.constexpr(8), gl.constexpr(6)
# What selects nothing comes last.
NOTHING = gl.constexpr(2147483647)


@gluon.jit
def _join(block_a, mask_a, count_a, block_b, mask_b, count_b):
    """Runs of one block, from the left: the union of their masks and how many they are."""
    same = block_a == block_b
    return block_b, gl.where(same, mask_a | mask_b, mask_b), gl.where(same, count_a + count_b, count_b)


@gluon.jit
def _spread(block_a, count_a, block_b, count_b):
    """Runs of one block, from the right: the count at their end."""
    return block_b, gl.where(block_a == block_b, gl.maximum(count_a, count_b), count_b)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _list_few(
    indices_ptr,
    blocks_ptr,
    masks_ptr,
    num_tokens,
    num_slots,
    num_blocks,
    num_seen,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    LOG_TOKENS: gl.constexpr,
    LOG_SLOTS: gl.constexpr,
    MIN_TOKENS: gl.constexpr,
    FEW_LEFT: gl.constexpr,
    MOST_BLOCKS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Lists all blocks of a tile, if it attends them all and they are found before the search ends.

    Returns whether it did, how many of them are seen whole, and how many there are.
    """
    # A thread has rows of ids, of one token each.
    layout: gl.constexpr = gl.BlockedLayout([1, 1 << LOG_SLOTS], [32, 1], [WARPS, 1], [1, 0])
    token = gl.arange(0, 1 << LOG_TOKENS, gl.SliceLayout(1, layout))
    slot = gl.arange(0, 1 << LOG_SLOTS, gl.SliceLayout(0, layout))
    inside = ((token < TOKENS) & (token < num_tokens))[:, None] & (slot < num_slots)[None, :]
    ids = gl.load(indices_ptr + (token * num_slots)[:, None] + slot[None, :], mask=inside, other=-1)
    valid = (ids >= 0) & (ids < num_blocks)
    num_choices = gl.sum(gl.sum(valid.to(gl.int32), 1), 0)
    num_missing = num_choices
    ids = gl.where(valid, ids, -1)
    bit = gl.full([1 << LOG_TOKENS], 1, gl.uint32, token.type.layout) << (token & 31).to(gl.uint32)
    block = num_choices * 0 - 1
    step = num_choices * 0
    found = num_choices * 0
    num_whole = num_choices * 0
    num_few = num_choices * 0
    num_chosen = num_choices * 0
    is_on = num_choices > 0
    while is_on:
        # To the least above the last one: ids that have been, and those that select nothing, are larger here.
        # With a sign they are negative: where none is above and some are missing, those that a row has twice.
        ahead = gl.min((ids - (block + 1)).to(gl.uint32), 1)
        least = gl.min(ahead, 0)
        chose = ahead == least
        step = least.to(gl.int32)
        block += 1 + step
        count = gl.sum(chose.to(gl.int32), 0)
        mask = gl.sum(gl.where(chose & (token < 32), bit, 0), 0).to(gl.uint64)
        if TOKENS > 32:
            mask |= gl.sum(gl.where(chose & (token >= 32), bit, 0), 0).to(gl.uint64) << 32
        gl.store(blocks_ptr + found, block)
        gl.store(masks_ptr + found, mask.to(gl.int64))
        found += 1
        num_whole += ((block + 1) * BLOCK_SIZE <= num_seen).to(gl.int32)
        num_few += gl.where(count < MIN_TOKENS, count, 0)
        num_chosen += count
        num_missing -= count
        agrees = (found < FIRST_FOUND) | (num_chosen * SEARCH_WHILE >= found * TOKENS)
        is_on = (num_missing > 0) & (step >= 0) & (found < MOST_BLOCKS) & agrees
    is_all = (num_missing == 0) & (step >= 0)
    return is_all & (num_few * FEW_LEFT < num_choices), num_whole, found


@gluon.jit
def _leave_nothing(
    leftover_ptr,
    first,
    first_token,
    num_tokens,
    q_end,
    num_slots,
    TOKENS: gl.constexpr,
    LOG_TOKENS: gl.constexpr,
    LOG_SLOTS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Writes -1 for all that a tile's tokens chose, those of the group."""
    place = gl.arange(0, 1 << (LOG_TOKENS + LOG_SLOTS), gl.BlockedLayout([1], [32], [WARPS], [0]))
    token, slot = place >> LOG_SLOTS, place & ((1 << LOG_SLOTS) - 1)
    here = (token < TOKENS) & (first + token < q_end) & (slot < num_slots)
    first -= first_token
    here &= (first + token >= 0) & (first + token < num_tokens)
    ptrs = leftover_ptr + first.to(gl.int64) * num_slots + (token * num_slots + slot)
    gl.store(ptrs, gl.full([1 << (LOG_TOKENS + LOG_SLOTS)], -1, gl.int32, place.type.layout), mask=here)


@partial(kernel, jit=gluon.jit)
def agree(
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
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    LOG_TOKENS: gl.constexpr,
    LOG_SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    MIN_TOKENS: gl.constexpr,
    FEW_LEFT: gl.constexpr,
    MOST_BLOCKS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    WITH_LEFTOVER: gl.constexpr,
    WITH_INDEX: gl.constexpr,
    SEARCHES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Arguments as of ``_agree``; whether blocks are searched first, and how many warps a tile has."""
    tile = first_tile + gl.program_id(0)
    head = gl.program_id(1).to(gl.int64)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    tile_place = head * num_tiles + gl.program_id(0)
    if first >= q_end:
        gl.store(counts_ptr + tile_place * 2, 0)
        gl.store(counts_ptr + tile_place * 2 + 1, 0)
        return
    num_blocks, num_seen = tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    if SEARCHES:
        # A group's border may cut the tile; what it lists is of all its tokens.
        first_id = first.to(gl.int64) * num_slots
        row_ptr = indices_ptr + (first_index_head + head) * head_stride + first_id
        list_place = tile_place * MAX_SHARED
        all_listed, num_whole, num_listed = _list_few(
            row_ptr, blocks_ptr + list_place, masks_ptr + list_place, q_end - first, num_slots, num_blocks,
            num_seen, BLOCK_SIZE, TOKENS, LOG_TOKENS, LOG_SLOTS, MIN_TOKENS, FEW_LEFT, MOST_BLOCKS, WARPS,
        )  # fmt: skip
        if all_listed:
            gl.store(counts_ptr + tile_place * 2, num_whole)
            gl.store(counts_ptr + tile_place * 2 + 1, num_listed)
            if WITH_LEFTOVER:
                _leave_nothing(
                    leftover_ptr + head * leftover_stride, first, first_token, num_tokens, q_end, num_slots,
                    TOKENS, LOG_TOKENS, LOG_SLOTS, WARPS,
                )  # fmt: skip
            return
    LOG_SIZE: gl.constexpr = LOG_TOKENS + LOG_SLOTS
    SIZE: gl.constexpr = 1 << LOG_SIZE
    # Loads and stores of the tile's rows are of neighbours by neighbouring threads; all else is not.
    rows_layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    layout: gl.constexpr = gl.BlockedLayout([SIZE // (32 * WARPS)], [32], [WARPS], [0])
    place = gl.arange(0, SIZE, rows_layout)
    token, slot = place >> LOG_SLOTS, place & ((1 << LOG_SLOTS) - 1)
    inside = (token < TOKENS) & (first + token < q_end) & (slot < num_slots)
    # All that the tile has lies at small offsets from its first.
    first_id = first.to(gl.int64) * num_slots
    id_place = token * num_slots + slot
    indices_ptr += (first_index_head + head) * head_stride + first_id
    ids = gl.load(indices_ptr + id_place, mask=inside, other=-1)
    # Ids that name no block of the sequence select nothing.
    valid = inside & (ids >= 0) & (ids < num_blocks)
    keys = gl.where(valid, (ids << LOG_SIZE) | place, NOTHING)
    key = sort(to_neighbours(keys, LOG_SIZE, WARPS), LOG_SIZE)
    exists = key != NOTHING
    block, place_of = key >> LOG_SIZE, key & (SIZE - 1)
    token_of, slot_of = place_of >> LOG_SLOTS, place_of & ((1 << LOG_SLOTS) - 1)
    # What is scanned takes registers.
    mask_dtype: gl.constexpr = gl.uint32 if TOKENS <= 32 else gl.uint64
    bit = gl.where(exists, gl.full([SIZE], 1, mask_dtype, layout) << token_of.to(mask_dtype), 0)
    _block, mask, count = gl.associative_scan((block, bit, exists.to(gl.int32)), 0, _join)
    _block, total = gl.associative_scan((block, count), 0, _spread, reverse=True)
    is_shared = exists & (total >= MIN_TOKENS)
    # A few partials cost more than a few blocks that hardly any of the tokens chose.
    num_left = gl.sum((exists & (total < MIN_TOKENS)).to(gl.int32), 0)
    num_listed = gl.sum((exists & (count == total)).to(gl.int32), 0)
    all_shared = (num_left * FEW_LEFT < gl.sum(exists.to(gl.int32), 0)) & (num_listed <= MOST_BLOCKS)
    is_shared = is_shared | (exists & all_shared)
    is_last = is_shared & (count == total)
    list_place = gl.associative_scan(is_last.to(gl.int32), 0, _add) - 1
    gl.store(blocks_ptr + (tile_place * MAX_SHARED + list_place), block, mask=is_last)
    gl.store(masks_ptr + (tile_place * MAX_SHARED + list_place), mask.to(gl.int64), mask=is_last)
    is_whole = is_last & ((block + 1) * BLOCK_SIZE <= num_seen)
    gl.store(counts_ptr + tile_place * 2, gl.sum(is_whole.to(gl.int32), 0))
    gl.store(counts_ptr + tile_place * 2 + 1, gl.sum(is_last.to(gl.int32), 0))
    if WITH_LEFTOVER:
        leftover_ptr += head * leftover_stride
        if all_shared:
            _leave_nothing(
                leftover_ptr, first, first_token, num_tokens, q_end, num_slots, TOKENS, LOG_TOKENS, LOG_SLOTS,
                WARPS,
            )  # fmt: skip
        else:
            # A tile at the border of a group of tokens is seen by both groups; each keeps its own tokens.
            first -= first_token
            leftover_ptr += first.to(gl.int64) * num_slots
            here = inside & ~valid & (first + token >= 0) & (first + token < num_tokens)
            gl.store(leftover_ptr + id_place, gl.full([SIZE], -1, gl.int32, rows_layout), mask=here)
            mine = exists & (first + token_of >= 0) & (first + token_of < num_tokens)
            left = gl.where(is_shared, -1, block)
            gl.store(leftover_ptr + (token_of * num_slots + slot_of), left, mask=mine)
            if WITH_INDEX:
                gl.store(left_ptr + LEFT, 1, mask=num_left > 0)


def num_warps(problem: Problem, tile: QueryTile, is_alone: bool) -> int:
    """Of a program; 0 if a thread would have no number. ``is_alone``: few tiles are on a multiprocessor."""
    size = _size(problem, tile)
    if size < 32:
        return 0
    return 2 if is_alone and size > MANY else 1


def searches(problem: Problem, tile: QueryTile, is_alone: bool) -> bool:
    """Whether a tile's blocks are looked for one by one before all is sorted.

    Not where few tiles are on a multiprocessor: all wait for the one that is searched and then sorted.
    """
    is_many = _size(problem, tile) >= FEWEST_SEARCHED and tile.tokens >= 32
    return is_many and not is_alone and tile.min_tokens > 1


def _size(problem: Problem, tile: QueryTile) -> int:
    return power_of_two(tile.tokens) * power_of_two(problem.num_slots)

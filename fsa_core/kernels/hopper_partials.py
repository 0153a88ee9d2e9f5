"""Partials of selected attention and their merge, for Hopper: ``partials._partial`` and ``_merge`` in Gluon.

One launch for all chunks of a group, whose rows are merged while the next chunk's tiles are attended
(``hopper_chunks``). Where query tiles left nothing, it ends.

A row's numbers depend on nothing but the row, and slots are added in their order: the bits are the twins'.
"""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsa_core.kernels.hopper_chunks import (
    any_items,
    new_meeting,
)
from fsa_core.kernels.hopper_items import (
    ROWS_LAYOUT,
    begin_scores,
    copy_chunks,
    keys_of,
    multiply_chunks,
    new_items,
    pairs_of,
    places_of,
    release_keys,
    store_places,
    visible,
)
from fsa_core.kernels.hopper_merges import (
    MANY_LAYOUT,
    MANY_ROWS,
    MERGING_WARPS,
    ROWS,
    SLOTS,
    TILES,
    add_slots,
    all_rows,
    halves,
    merge_chunks,
    new_numbers,
    new_ring,
    rows_of_tile,
    store_answers,
    used_slots,
    whole,
    words_of,
)
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, share_of
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LN_2
from fsa_core.tiles import TileShape

# Tiles of q and batches of slots in shared memory, by the keys of a block: as many as there is room for.
STAGES, BATCHES = {128: 2}, {128: 2}
MOST_STAGES, MOST_BATCHES = 3, 8
# Of a multiplying, a copying and a merging thread; those of the first multiplying group are what is left of
# 512.
REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS = 152, 104, 104


@gluon.jit
def _attend_tile(
    given,
    blocks,
    tiles,
    stage,
    note,
    HEADS_PER_PAIR: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Outputs of a tile's rows, normalised, and log-sum-exps in log2 units."""
    out_ptr, lse_ptr, out_tile, scale, num_slots = given
    k_blocks, v_blocks, _keys_free = blocks
    q_tiles, pair_tiles, _notes, _ready, free = tiles
    BLOCK_SIZE: gl.constexpr = k_blocks.shape[1]
    VALUE_DIM: gl.constexpr = v_blocks.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    no_out = gl.zeros([SIDE, VALUE_DIM], gl.float32, out_layout)
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, scores_layout))
    out_rows = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT))
    _word, seen, first_row = note
    num_pairs = pairs_of(note)
    scores = begin_scores(blocks, tiles, stage, note)
    pairs = pair_tiles.index(stage).load(rows.type.layout)
    out_pairs = pair_tiles.index(stage).load(out_rows.type.layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(free.index(stage), count=1)
    # The chunk's first token sees least.
    if seen < BLOCK_SIZE - 1:
        scores = gl.where(visible(pairs, seen, BLOCK_SIZE, CAUSAL), scores, float("-inf"))
    row_max = gl.max(scores, 1)
    finite = gl.where(row_max == float("-inf"), 0.0, row_max)
    weights = gl.exp2(scores * scale - (finite * scale)[:, None])
    row_sum = gl.sum(weights, 1)
    left = gl.convert_layout(weights.to(dtype), weights_layout)
    out = warpgroup_mma(left, v_blocks.index(keys_of(note)), no_out, use_acc=False, is_async=True)
    pair = rows // HEADS_PER_PAIR
    lse_ptrs = lse_ptr + places_of(pairs, rows, first_row, num_slots, HEADS_PER_PAIR)
    lse = row_max * scale + gl.log2(row_sum)
    gl.store(lse_ptrs, lse, mask=(pair < SIDE // HEADS_PER_PAIR) & (pair < num_pairs))
    share = gl.convert_layout(share_of(row_sum), gl.SliceLayout(1, out_layout))
    places = places_of(out_pairs, out_rows, first_row, num_slots, HEADS_PER_PAIR)
    out = warpgroup_mma_wait(0, deps=[out]) * share[:, None]
    release_keys(blocks, note)
    store_places(out_ptr, out, out_tile, places, num_pairs, HEADS_PER_PAIR)


@gluon.jit
def _load_lse(partial_lse_ptr, lse_place, bits, first_slot, HEADS_PER_PAIR: gl.constexpr):
    """Log-sum-exps of rows in SLOTS slots, -inf in one that is not used."""
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, bits.type.layout.parent))
    ptrs = partial_lse_ptr + (lse_place[:, None] + ((first_slot + slots) * HEADS_PER_PAIR)[None, :])
    mask = ((bits[:, None] >> slots[None, :]) & 1) != 0
    # What lay here before the programs met must not be found again.
    return gl.load(ptrs, mask=mask, other=float("-inf"), cache_modifier=".cg")


@gluon.jit
def _sum_after(before, weights):
    """``before`` and each weight of a row, in their order: a thread has a row, and adds in order."""
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, MANY_LAYOUT))
    return gl.sum(gl.where((slots == 0)[None, :], before[:, None] + weights, weights), 1)


@gluon.jit
def _weigh_tiles(
    given,
    first_rows,
    first_tile,
    bits,
    places,
    used_ptr,
    chunk,
    tokens,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """Of the rows of TILES tiles: their log-sum-exps; the weights of the first SLOTS slots and of what out
    holds, what the sum is multiplied by, and the largest log-sum-exp.
    """
    partial_lse_ptr, answers, weights, beside = given
    _first, num_tokens, num_slots = tokens
    partial_lse_ptr += first_rows[0]
    lse_ptr = answers[1] + first_rows[1]
    row = gl.arange(0, TILES * ROWS, MANY_ROWS)
    tile = first_tile + row // ROWS * gl.num_programs(0)
    token, in_pair = rows_of_tile(tile, row % ROWS, HEADS_PER_PAIR)
    lse_place = token * num_slots * HEADS_PER_PAIR + in_pair
    any_bits = bits.load(MANY_ROWS)
    lse = _load_lse(partial_lse_ptr, lse_place, any_bits, 0, HEADS_PER_PAIR)
    place = places.load(MANY_ROWS)
    exists = place >= 0
    shared_lse = gl.full([TILES * ROWS], float("-inf"), gl.float32, MANY_ROWS)
    if WITH_SHARED:
        shared_lse = gl.load(lse_ptr + place, mask=exists, other=float("-inf")) / LN_2
    row_max = gl.maximum(shared_lse, gl.max(lse, 1))
    if MORE_SLOTS:
        words_place, _head = words_of(token, chunk, num_tokens, INDEX_PER_HEAD)
        for first_slot in range(SLOTS, num_slots, SLOTS):
            more_bits = used_slots(used_ptr, words_place, exists, first_slot)
            any_bits |= more_bits
            more_lse = _load_lse(partial_lse_ptr, lse_place, more_bits, first_slot, HEADS_PER_PAIR)
            row_max = gl.maximum(row_max, gl.max(more_lse, 1))
    shift = gl.where(row_max == float("-inf"), 0.0, row_max)
    first_weights = gl.exp2(lse - shift[:, None])
    shared_weight = gl.exp2(shared_lse - shift)
    row_sum = _sum_after(shared_weight, first_weights)
    if MORE_SLOTS:
        for first_slot in range(SLOTS, num_slots, SLOTS):
            more_bits = used_slots(used_ptr, words_place, exists, first_slot)
            more_lse = _load_lse(partial_lse_ptr, lse_place, more_bits, first_slot, HEADS_PER_PAIR)
            row_sum = _sum_after(row_sum, gl.exp2(more_lse - shift[:, None]))
    tile_by_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles = weights._reinterpret(gl.float32, [TILES, SLOTS, ROWS], tile_by_tile)
    tiles.permute([0, 2, 1]).store(gl.reshape(first_weights, [TILES, ROWS, SLOTS]))
    all_rows(beside).index(0).store(shared_weight)
    all_rows(beside).index(1).store(share_of(row_sum))
    all_rows(beside).index(2).store(shift)
    if WITH_SHARED:
        # The others stay as they are.
        exists &= any_bits != 0
    gl.store(lse_ptr + place, (row_max + gl.log2(row_sum)) * LN_2, mask=exists)


@gluon.jit
def _weigh_more(
    given, first_rows, tile, number, first_slot, slot_bits, num_slots, HEADS_PER_PAIR: gl.constexpr
):
    """Weights of SLOTS further slots of a tile, over those of the slots before."""
    partial_lse_ptr, _answers, weights, beside = given
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    token, in_pair = rows_of_tile(tile, gl.arange(0, ROWS, row_layout), HEADS_PER_PAIR)
    lse_place = token * num_slots * HEADS_PER_PAIR + in_pair
    bits = gl.convert_layout(slot_bits, row_layout)
    lse = _load_lse(partial_lse_ptr + first_rows[0], lse_place, bits, first_slot, HEADS_PER_PAIR)
    shift = beside.index(2 * TILES + number).load(row_layout)
    by_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    places = weights._reinterpret(gl.float32, [TILES, SLOTS, ROWS], by_rows).index(number)
    places.permute([1, 0]).store(gl.exp2(lse - shift[:, None]))


@gluon.jit
def _merge_tile(
    given,
    first_rows,
    tile,
    number,
    places,
    held,
    slots,
    next_slots,
    used_ptr,
    chunk,
    tokens,
    ring,
    layout: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """A tile of a chunk's rows, the so many-th of those weighed: what ``partials._merge`` makes of it.

    ``places``: which rows of the chunk's answers they are; ``held``: what these hold. All else as
    ``add_slots`` has it.
    """
    _partial_lse_ptr, answers, weights, beside = given
    DIM: gl.constexpr = ring[0].shape[1]
    half_layout: gl.constexpr = gl.BlockedLayout([1, 4], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    half_rows: gl.constexpr = gl.SliceLayout(1, half_layout)
    shared_weight = beside.index(number).load(half_rows)
    even, odd = halves(held.to(gl.float32), half_layout)
    even *= shared_weight[:, None]
    odd *= shared_weight[:, None]
    even, odd, any_bits = add_slots(
        even, odd, _weigh_more, weights, given, first_rows, tile, number, places, slots, next_slots, used_ptr,
        chunk, tokens, ring, HEADS_PER_PAIR, INDEX_PER_HEAD, gl.constexpr(True), MORE_SLOTS,
    )  # fmt: skip
    share = beside.index(TILES + number).load(half_rows)
    x = whole(even * share[:, None], odd * share[:, None], layout)
    store_answers(answers[0] + first_rows[1] * DIM, x, places, any_bits, WITH_SHARED)


@partial(kernel, jit=gluon.jit)
def attend_pairs(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    counts_ptr,
    used_ptr,
    pairs_ptr,
    item_offsets_ptr,
    records_ptr,
    out_ptr,
    lse_ptr,
    scale,
    first_token,
    num_tokens,
    chunk_tokens,
    first_head,
    num_heads,
    chunk_heads,
    num_slots,
    num_segments,
    num_chunks,
    group_tokens,
    max_items,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    BATCHES: gl.constexpr,
    REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    MERGING_REGISTERS: gl.constexpr,
):
    """All chunks of a group: tokens and heads from the first on. Arguments as of ``_partial`` and ``_merge``.

    All programs have to run at once. The second of ``counts``, which nothing else uses, is 0 or -2^31 before
    and afterwards.
    """
    counter_ptr = counts_ptr + 1
    index = (pairs_ptr, item_offsets_ptr, records_ptr)
    # Before what a program of four groups takes to begin.
    if WITH_SHARED:  # noqa: SIM102 - the first condition is known when the kernel is compiled
        if not any_items(item_offsets_ptr, num_chunks * (num_heads if INDEX_PER_HEAD else 1), num_segments):
            return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    blocks, tiles = new_items(dtype, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, STAGES)
    meeting = new_meeting()
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], out_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weights = gl.allocate_shared_memory(gl.float32, [TILES * SLOTS, ROWS], flat)
    ring = new_ring(dtype, VALUE_DIM, BATCHES)
    first_row = first_head * HEADS_PER_PAIR
    schedule = (
        first_token, num_tokens, chunk_tokens, num_heads, chunk_heads, num_chunks, num_segments, group_tokens,
        num_slots, max_items,
    )  # fmt: skip
    q_ptr += first_row * HEAD_DIM
    answers = (out_ptr + first_row * VALUE_DIM, lse_ptr + first_row)
    gl.warp_specialize(
        [
            (multiply_chunks, (
                gl.constexpr(_attend_tile),
                (partial_out_ptr, partial_lse_ptr, out_tiles.index(0), scale, num_slots), meeting, blocks,
                tiles, HEADS_PER_PAIR, CAUSAL, gl.constexpr(0),
            )),
            (multiply_chunks, (
                gl.constexpr(_attend_tile),
                (partial_out_ptr, partial_lse_ptr, out_tiles.index(1), scale, num_slots), meeting, blocks,
                tiles, HEADS_PER_PAIR, CAUSAL, gl.constexpr(1),
            )),
            (copy_chunks, (
                (q_ptr, k_ptr, v_ptr, q_ptr, lse_ptr, lse_ptr), index, schedule, (first_head, 0), blocks,
                tiles, (), NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD,
                HEAD_DIM, VALUE_DIM, BLOCK_SIZE, WITH_SHARED, gl.constexpr(False),
            )),
            (merge_chunks, (
                gl.constexpr(_weigh_tiles), gl.constexpr(_merge_tile), partial_out_ptr, answers[0],
                (partial_lse_ptr, answers, weights, new_numbers(gl.float32, 3)), used_ptr, counter_ptr, index,
                schedule, meeting, ring, NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED,
                MORE_SLOTS,
            )),
        ],
        [4, COPYING_WARPS, MERGING_WARPS],
        [REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS],
    )  # fmt: skip


def constants(tile: TileShape, num_slots: int) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_partial`` and ``_merge``."""
    return {
        "STAGES": STAGES.get(tile.keys, MOST_STAGES),
        "BATCHES": BATCHES.get(tile.keys, MOST_BATCHES), "REGISTERS": REGISTERS,
        "COPYING_REGISTERS": COPYING_REGISTERS, "MERGING_REGISTERS": MERGING_REGISTERS, "num_warps": 4,
        "launch_cooperative_grid": True, "MORE_SLOTS": num_slots > SLOTS.value,
    }  # fmt: skip

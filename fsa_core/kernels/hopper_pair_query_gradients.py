"""The gradient of q pair by pair, for Hopper: ``_of_pairs`` and ``_sum_shares`` in Gluon.

One launch for all chunks of a group, as in ``hopper_partials``. A row's share depends on nothing but the row,
and slots are added in their order: the bits are the twins'.
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

from fsa_core.kernels.block_share import row_shift
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
    MERGING_WARPS,
    SLOTS,
    add_slots,
    halves,
    merge_chunks,
    new_ring,
    no_weights,
    store_answers,
    whole,
)
from fsa_core.kernels.hopper_row_shares import LOG2_E
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE
from fsa_core.kernels.launch import kernel
from fsa_core.tiles import TileShape

STAGES, BATCHES = 3, 4
# Of a multiplying, a copying and a merging thread; those of the first multiplying group are what is left of
# 512.
REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS = 136, 112, 128


@gluon.jit
def _share_tile(
    given,
    blocks,
    tiles,
    stage,
    note,
    HEADS_PER_PAIR: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A tile's rows' shares of grad_q; arguments as ``hopper_partials._attend_tile`` has them."""
    shares_ptr, beside, scale, num_slots = given
    k_blocks, v_blocks, _keys_free = blocks
    q_tiles, pair_tiles, _notes, _ready, free = tiles
    out_tiles, lse_tiles, delta_tiles = beside
    BLOCK_SIZE: gl.constexpr = k_blocks.shape[1]
    HEAD_DIM: gl.constexpr = k_blocks.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    share_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, share_layout, 2)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    zeros = gl.zeros([SIDE, BLOCK_SIZE], gl.float32, scores_layout)
    no_share = gl.zeros([SIDE, HEAD_DIM], gl.float32, share_layout)
    share_rows = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT))
    _word, seen, first_row = note
    place = keys_of(note)
    scores = begin_scores(blocks, tiles, stage, note)
    v = v_blocks.index(place).permute([1, 0])
    grad_weights = warpgroup_mma(out_tiles.index(stage), v, zeros, use_acc=False, is_async=True)
    share_pairs = pair_tiles.index(stage).load(share_rows.type.layout)
    shift = row_shift(lse_tiles.index(stage).load(row_layout))
    delta = delta_tiles.index(stage).load(row_layout)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    # The chunk's first token sees least.
    if seen < BLOCK_SIZE - 1:
        pairs = pair_tiles.index(stage).load(row_layout)
        weights = gl.where(visible(pairs, seen, BLOCK_SIZE, CAUSAL), weights, 0.0)
    grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
    grad_scores = weights * (grad_weights - delta[:, None])
    left = gl.convert_layout(grad_scores.to(dtype), left_layout)
    share = warpgroup_mma(left, k_blocks.index(place), no_share, use_acc=False, is_async=True)
    places = places_of(share_pairs, share_rows, first_row, num_slots, HEADS_PER_PAIR)
    # Scaled here: a share that was not might overflow float16.
    share = warpgroup_mma_wait(0, deps=[share]) * scale
    release_keys(blocks, note)
    # By way of the rows of q, which are read.
    store_places(shares_ptr, share, q_tiles.index(stage), places, pairs_of(note), HEADS_PER_PAIR)
    mbarrier.arrive(free.index(stage), count=1)


@gluon.jit
def _as_they_are(
    _given,
    _first_rows,
    _first_tile,
    _bits,
    _places,
    _used_ptr,
    _chunk,
    _tokens,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """Shares are added up without weights."""


@gluon.jit
def _sum_tile(
    grad_q_ptr,
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
    """A tile of a chunk's rows: what ``_sum_shares`` makes of it. Arguments as of ``_merge_tile``."""
    DIM: gl.constexpr = ring[0].shape[1]
    half_layout: gl.constexpr = gl.BlockedLayout([1, 4], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    even, odd = halves(held.to(gl.float32), half_layout)
    even, odd, any_bits = add_slots(
        even, odd, no_weights, ring[0], grad_q_ptr, first_rows, tile, number, places, slots, next_slots,
        used_ptr, chunk, tokens, ring, HEADS_PER_PAIR, INDEX_PER_HEAD, gl.constexpr(False), MORE_SLOTS,
    )  # fmt: skip
    x = whole(even, odd, layout)
    store_answers(grad_q_ptr + first_rows[1] * DIM, x, places, any_bits, WITH_SHARED)


@partial(kernel, jit=gluon.jit)
def of_pairs(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    shares_ptr,
    counts_ptr,
    used_ptr,
    pairs_ptr,
    item_offsets_ptr,
    records_ptr,
    grad_q_ptr,
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
    first_delta_head,
    num_delta_heads,
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
    """All chunks of a group: tokens and heads from the first on. Arguments as of ``_of_pairs`` and
    ``_sum_shares``.

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
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    out_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, VALUE_DIM], out_layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, SIDE], flat)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, SIDE], flat)
    first_row = first_head * HEADS_PER_PAIR
    pointers = (
        q_ptr + first_row * HEAD_DIM, k_ptr, v_ptr, grad_out_ptr + first_row * VALUE_DIM, lse_ptr + first_row,
        delta_ptr + (first_row - first_delta_head),
    )  # fmt: skip
    schedule = (
        first_token, num_tokens, chunk_tokens, num_heads, chunk_heads, num_chunks, num_segments, group_tokens,
        num_slots, max_items,
    )  # fmt: skip
    beside = (out_tiles, lse_tiles, delta_tiles)
    grad_q_ptr += first_row * HEAD_DIM
    ring = new_ring(dtype, HEAD_DIM, BATCHES)
    gl.warp_specialize(
        [
            (multiply_chunks, (
                gl.constexpr(_share_tile), (shares_ptr, beside, scale, num_slots), meeting, blocks, tiles,
                HEADS_PER_PAIR, CAUSAL, gl.constexpr(0),
            )),
            (multiply_chunks, (
                gl.constexpr(_share_tile), (shares_ptr, beside, scale, num_slots), meeting, blocks, tiles,
                HEADS_PER_PAIR, CAUSAL, gl.constexpr(1),
            )),
            (copy_chunks, (
                pointers, index, schedule, (first_head, num_delta_heads), blocks, tiles, beside,
                NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM,
                VALUE_DIM, BLOCK_SIZE, WITH_SHARED, gl.constexpr(True),
            )),
            (merge_chunks, (
                gl.constexpr(_as_they_are), gl.constexpr(_sum_tile), shares_ptr, grad_q_ptr, grad_q_ptr,
                used_ptr, counter_ptr, index, schedule, meeting, ring, NUM_Q_HEADS, HEADS_PER_PAIR,
                INDEX_PER_HEAD, WITH_SHARED, MORE_SLOTS,
            )),
        ],
        [4, COPYING_WARPS, MERGING_WARPS],
        [REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS],
    )  # fmt: skip


def constants(tile: TileShape, num_slots: int) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_of_pairs``."""
    return {
        "STAGES": STAGES, "BATCHES": BATCHES, "REGISTERS": REGISTERS,
        "COPYING_REGISTERS": COPYING_REGISTERS, "MERGING_REGISTERS": MERGING_REGISTERS, "num_warps": 4,
        "launch_cooperative_grid": True, "MORE_SLOTS": num_slots > SLOTS.value,
    }  # fmt: skip

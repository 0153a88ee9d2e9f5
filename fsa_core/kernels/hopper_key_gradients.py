"""The gradients of k and v for Hopper: what ``key_gradients._gradients`` computes, item by item, in Gluon.

A program is four groups of four warps. One gathers the rows of q and grad_out that chose the block, a tile
of 64 at a time, as many tiles ahead as shared memory has room for. Two weigh, one the even tiles of the item
and the other the odd ones: they leave a tile's weights and the gradients of its scores in shared memory. One
adds what these give to the gradients of the keys, which it has in registers. It has nothing else to do, and
those that weigh have no sums to keep, so that the matrix units have work while weights are computed.

Tiles are added in the order of the block's pairs, as in the twin: the bits are the same.
"""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsa_core.backward_plan import KeyPlan
from fsa_core.kernels.hopper_row_shares import (
    COPYING_WARPS,
    SCORES,
    SIDE,
    begin_scores,
    new_row_tiles,
    store_keys,
    weigh,
    zero_gradients,
)
from fsa_core.kernels.hopper_tiles import copy_rows, gather_rows, multiplies
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import find_block
from fsa_core.problem import Problem

STAGES = 5
# Of a weighing and of a gathering thread; those of an adding one are what is left of 512. With fewer the loop
# that weighs spills.
WEIGHING_REGISTERS, GATHERING_REGISTERS = 136, 64


@gluon.jit
def _gather(
    pointers,
    tiles,
    num_pairs,
    num_delta_heads,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    SLOT_BITS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the stages in turn with the item's tiles: rows, and of each its lse, delta and pair."""
    q_ptr, grad_out_ptr, lse_ptr, delta_ptr, pairs_ptr = pointers
    row_tiles, pair_tiles = tiles
    q_tiles, out_tiles, lse_tiles, delta_tiles, ready, free = row_tiles
    # A warp copies four half rows at once, 16 bytes a thread.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [COPYING_WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    pair_in_tile, heads = rows // HEADS_PER_PAIR, rows % HEADS_PER_PAIR
    flat_rows = gl.arange(0, SIDE, flat)
    flat_pair_in_tile, flat_heads = flat_rows // HEADS_PER_PAIR, flat_rows % HEADS_PER_PAIR
    is_pair, is_flat_pair = pair_in_tile < PAIRS, flat_pair_in_tile < PAIRS
    mask, flat_mask = is_pair & (pair_in_tile < num_pairs), is_flat_pair & (flat_pair_in_tile < num_pairs)
    pairs = gl.load(pairs_ptr + pair_in_tile, mask=mask, other=0)
    flat_pairs = gl.load(pairs_ptr + flat_pair_in_tile, mask=flat_mask, other=0)
    for tile in range((num_pairs + PAIRS - 1) // PAIRS):
        stage = tile % STAGES
        row_mask, flat_row_mask = mask, flat_mask
        tokens, flat_tokens = pairs >> SLOT_BITS, flat_pairs >> SLOT_BITS
        pair_ptrs = pairs_ptr + tile * PAIRS + flat_pair_in_tile
        # The next tile's pairs are on their way while this one's rows are.
        start = (tile + 1) * PAIRS
        mask = is_pair & (start + pair_in_tile < num_pairs)
        flat_mask = is_flat_pair & (start + flat_pair_in_tile < num_pairs)
        pairs = gl.load(pairs_ptr + start + pair_in_tile, mask=mask, other=0)
        flat_pairs = gl.load(pairs_ptr + start + flat_pair_in_tile, mask=flat_mask, other=0)
        mbarrier.wait(free.index(stage), ((tile // STAGES) & 1) ^ 1)
        q_rows = tokens * (NUM_Q_HEADS * HEAD_DIM) + heads * HEAD_DIM
        out_rows = tokens * (NUM_Q_HEADS * VALUE_DIM) + heads * VALUE_DIM
        gather_rows(q_ptr, q_tiles.index(stage), q_rows, row_mask, HEAD_DIM, layout)
        gather_rows(grad_out_ptr, out_tiles.index(stage), out_rows, row_mask, VALUE_DIM, layout)
        lse_ptrs = lse_ptr + flat_tokens * NUM_Q_HEADS + flat_heads
        delta_ptrs = delta_ptr + flat_tokens * num_delta_heads + flat_heads
        async_copy.async_copy_global_to_shared(lse_tiles.index(stage), lse_ptrs, flat_row_mask)
        async_copy.async_copy_global_to_shared(delta_tiles.index(stage), delta_ptrs, flat_row_mask)
        async_copy.async_copy_global_to_shared(pair_tiles.index(stage), pair_ptrs, flat_row_mask)
        # Every thread arrives when its own copies have.
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)


@gluon.jit
def _weigh_tiles(
    item,
    tiles,
    given,
    block,
    HEAD_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    SLOT_BITS: gl.constexpr,
    CAUSAL: gl.constexpr,
    FIRST: gl.constexpr,
):
    """Of tile FIRST and every second after: weights and gradients of scores, [SIDE keys, SIDE rows]."""
    pairs_ptr, num_pairs, first_key, q_shift, k_length, scale = item
    row_tiles, pair_tiles = tiles
    q_tiles, out_tiles, lse_tiles, delta_tiles, ready, free = row_tiles
    weight_tiles, score_tiles, are_given = given
    k_ptr, v, v_ready, num_keys, k_row = block
    STAGES: gl.constexpr = q_tiles.shape[0]
    dtype: gl.constexpr = q_tiles.dtype
    # Keys in registers: shared memory is read for q alone. Those of v would not fit beside them.
    k_layout: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, k_layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, k_layout))
    k_ptrs = k_ptr + ((rows * k_row)[:, None] + dims[None, :])
    k = gl.load(k_ptrs, mask=(rows < num_keys)[:, None], other=0.0)
    mbarrier.wait(v_ready, 0)
    keys = first_key + gl.arange(0, SIDE, gl.SliceLayout(1, SCORES))
    # The token that sees the last key, and with it all of them.
    all_seen = first_key + SIDE - 1 - q_shift
    for tile in range(FIRST, (num_pairs + PAIRS - 1) // PAIRS, 2):
        stage = tile % STAGES
        # Pairs are in the order of their tokens: the first sees least.
        is_cut = (gl.load(pairs_ptr + tile * PAIRS) >> SLOT_BITS) < all_seen if CAUSAL else True
        mbarrier.wait(ready.index(stage), (tile // STAGES) & 1)
        fence_async_shared()
        scores, grad_weights = begin_scores(k, v, q_tiles.index(stage), out_tiles.index(stage))
        weights = weigh(scores, lse_tiles.index(stage), scale)
        # Keys past the end of the sequence come after every token.
        if CAUSAL:
            if is_cut:
                pairs = pair_tiles.index(stage).load(gl.SliceLayout(0, SCORES))
                positions = (pairs >> SLOT_BITS) + q_shift
                weights = gl.where(keys[:, None] <= positions[None, :], weights, 0.0)
        else:
            weights = gl.where((keys < k_length)[:, None], weights, 0.0)
        # What this group gave last has been added when the rows of that tile have been given up, to those of
        # the tile that is STAGES after it.
        heir = tile + (STAGES - 2)
        mbarrier.wait(free.index(heir % STAGES), ((heir // STAGES) & 1) ^ 1)
        weight_tiles.index(FIRST).store(weights.to(dtype))
        delta = delta_tiles.index(stage).load(gl.SliceLayout(0, SCORES))
        grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
        score_tiles.index(FIRST).store((weights * (grad_weights - delta[None, :])).to(dtype))
        mbarrier.arrive(are_given.index(FIRST), count=1)


@gluon.jit
def _add_tiles(
    item,
    tiles,
    given,
    block,
    answers,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    WITH_SUMS: gl.constexpr,
):
    """Copies the block's values; adds up its gradients from what is given of each tile, and writes them."""
    _pairs_ptr, num_pairs, _first_key, _q_shift, _k_length, scale = item
    q_tiles, out_tiles, _lse_tiles, _delta_tiles, _ready, free = tiles[0]
    weight_tiles, score_tiles, are_given = given
    v_ptr, v, v_ready, num_keys = block
    STAGES: gl.constexpr = q_tiles.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    copy_rows(v_ptr, v, rows * (NUM_KV_HEADS * VALUE_DIM), rows < num_keys, VALUE_DIM, layout)
    async_copy.mbarrier_arrive(v_ready, increment_count=False)
    grad_k, grad_v = zero_gradients(HEAD_DIM, VALUE_DIM)
    for tile in range((num_pairs + PAIRS - 1) // PAIRS):
        stage = tile % STAGES
        giver = tile % 2
        # Whoever gives it has waited for the rows.
        mbarrier.wait(are_given.index(giver), (tile // 2) & 1)
        fence_async_shared()
        grad_v = warpgroup_mma(weight_tiles.index(giver), out_tiles.index(stage), grad_v, is_async=True)
        grad_k = warpgroup_mma(score_tiles.index(giver), q_tiles.index(stage), grad_k, is_async=True)
        grad_v, grad_k = warpgroup_mma_wait(0, deps=[grad_v, grad_k])
        mbarrier.arrive(free.index(stage), count=1)
    of_k, of_v = answers
    _write(grad_k, of_k, scale, WITH_SUMS)
    _write(grad_v, of_v, 1.0, WITH_SUMS)


@gluon.jit
def _write(sums, answer, scale, WITH_SUMS: gl.constexpr):
    """Writes what an item adds: apart if its block has several items, else as the gradients or into a sum."""
    num_items, num_keys, split_ptr, sum_ptr, answer_ptr, width, row = answer
    if num_items > 1:
        store_keys(split_ptr, num_keys, sums, width, False)
    elif WITH_SUMS:
        store_keys(sum_ptr, num_keys, sums, width, True)
    else:
        store_keys(answer_ptr, num_keys, sums * scale, row, False)


@partial(kernel, jit=gluon.jit)
def gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    shares_ptr,
    sums_ptr,
    splits_ptr,
    grad_k_ptr,
    grad_v_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    item_segment_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    first_token,
    num_tokens,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    max_items,
    max_splits,
    first_kv_head,
    num_kv_heads,
    first_index_head,
    first_delta_head,
    num_delta_heads,
    rank,
    chunk,
    first_range_segment,
    range_segments,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAIRS: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
    WITH_SUMS: gl.constexpr,
    SLOT_BITS: gl.constexpr,
    STAGES: gl.constexpr,
    WEIGHING_REGISTERS: gl.constexpr,
    GATHERING_REGISTERS: gl.constexpr,
):
    """One work item under SIDE keys of its block; arguments as those of ``_gradients``, without shares."""
    item = gl.program_id(0) // num_kv_heads
    group_head = gl.program_id(0) % num_kv_heads
    first_part_key = gl.program_id(1) * SIDE
    kv_head = first_kv_head + group_head
    index_head = first_index_head + group_head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + chunk
    item_offsets_ptr += row * (num_segments + 1)
    num_items = gl.load(item_offsets_ptr + num_segments)
    # Loaded before it is known whether there is such an item, so as not to wait twice.
    segment = gl.load(item_segment_ptr + row.to(gl.int64) * max_items + item)
    if item >= num_items:
        return
    range_segment = segment - first_range_segment
    # No condition of both: the first is known when the kernel is compiled, and removes the second.
    if WITH_SUMS:  # noqa: SIM102
        if (range_segment < 0) | (range_segment >= range_segments):
            return
    block_start, k_start, k_length, q_shift = find_block(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE
    )
    # Pairs count tokens from the chunk's first.
    q_shift += first_token
    offsets_ptr += row * (num_segments + 1) + segment
    segment_start = gl.load(offsets_ptr)
    first_item = gl.load(item_offsets_ptr + segment)
    num_items = gl.load(item_offsets_ptr + segment + 1) - first_item
    # Of a block that has several; loaded here, where other loads are waited for as well.
    split = gl.load(split_offsets_ptr + row * (num_segments + 1) + segment) + item - first_item
    first_pair = (item - first_item) * PAIRS_PER_ITEM
    num_pairs = gl.minimum(gl.load(offsets_ptr + 1) - segment_start - first_pair, PAIRS_PER_ITEM)
    pairs_ptr += segment_start + first_pair
    first_head = kv_head * GROUP_SIZE + rank * HEADS_PER_PAIR
    first_q_row = first_token.to(gl.int64) * NUM_Q_HEADS + first_head
    q_ptr += first_q_row * HEAD_DIM
    grad_out_ptr += first_q_row * VALUE_DIM
    lse_ptr += first_q_row
    delta_ptr += first_token.to(gl.int64) * num_delta_heads + (first_head - first_delta_head)

    first_key = block_start + first_part_key
    num_keys = k_length - first_key
    first_key_row = (k_start + first_key).to(gl.int64) * NUM_KV_HEADS + kv_head
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    # A stage is free when its tile has been added.
    row_tiles = new_row_tiles(dtype, HEAD_DIM, VALUE_DIM, STAGES, 1)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = (row_tiles, gl.allocate_shared_memory(gl.int32, [STAGES, SIDE], flat))
    # Of each weighing group, the tile that it gives.
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, SIDE], dtype)
    weight_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, SIDE], weight_layout)
    score_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, SIDE], weight_layout)
    are_given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for giver in gl.static_range(2):
        mbarrier.init(are_given.index(giver), count=1)
    given = (weight_tiles, score_tiles, are_given)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    v = gl.allocate_shared_memory(dtype, [SIDE, VALUE_DIM], v_layout)
    v_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # Each thread of the group that adds arrives when its own copies have.
    mbarrier.init(v_ready, count=4 * 32)
    pointers = (q_ptr, grad_out_ptr, lse_ptr, delta_ptr, pairs_ptr)
    item_of_block = (pairs_ptr, num_pairs, first_key, q_shift, k_length, scale)
    k_row: gl.constexpr = NUM_KV_HEADS * HEAD_DIM
    v_row: gl.constexpr = NUM_KV_HEADS * VALUE_DIM
    width: gl.constexpr = HEAD_DIM + VALUE_DIM
    splits_ptr += ((group_head.to(gl.int64) * max_splits + split) * BLOCK_SIZE + first_part_key) * width
    sum_block = group_head.to(gl.int64) * range_segments + range_segment
    sums_ptr += (sum_block * BLOCK_SIZE + first_part_key) * width
    k_place, v_place = first_key_row * HEAD_DIM, first_key_row * VALUE_DIM
    of_k = (num_items, num_keys, splits_ptr, sums_ptr, grad_k_ptr + k_place, width, k_row)
    of_v = (
        num_items, num_keys, splits_ptr + HEAD_DIM, sums_ptr + HEAD_DIM, grad_v_ptr + v_place, width, v_row,
    )  # fmt: skip
    keys = (k_ptr + k_place, v, v_ready, num_keys, k_row)
    gl.warp_specialize(
        [
            (_add_tiles, (
                item_of_block, tiles, given, (v_ptr + v_place, v, v_ready, num_keys), (of_k, of_v),
                NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, PAIRS, WITH_SUMS,
            )),
            (_weigh_tiles, (
                item_of_block, tiles, given, keys, HEAD_DIM, PAIRS, SLOT_BITS, CAUSAL, gl.constexpr(0),
            )),
            (_weigh_tiles, (
                item_of_block, tiles, given, keys, HEAD_DIM, PAIRS, SLOT_BITS, CAUSAL, gl.constexpr(1),
            )),
            (_gather, (
                pointers, tiles, num_pairs, num_delta_heads, NUM_Q_HEADS, HEADS_PER_PAIR, HEAD_DIM, VALUE_DIM,
                PAIRS, SLOT_BITS, STAGES,
            )),
        ],
        [4, 4, COPYING_WARPS],
        [WEIGHING_REGISTERS, WEIGHING_REGISTERS, GATHERING_REGISTERS],
    )  # fmt: skip


def takes(problem: Problem, plan: KeyPlan) -> bool:
    """Whether heads are as wide as the kernel multiplies, and tiles as plans have them for 16 bits."""
    is_full = plan.tile_rows == plan.tile_keys == SIDE.value
    return multiplies(problem) and is_full and not plan.with_queries


def constants() -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_gradients``."""
    return {
        "STAGES": STAGES, "WEIGHING_REGISTERS": WEIGHING_REGISTERS,
        "GATHERING_REGISTERS": GATHERING_REGISTERS, "num_warps": 4,
    }  # fmt: skip

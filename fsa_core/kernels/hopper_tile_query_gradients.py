"""The gradient of q over shared blocks, for Hopper: ``tile_query_gradients._of_tiles`` in Gluon.

A program is three groups of four warps and takes every so many-th tile of 128 rows, as in ``hopper_tiles``.
One group copies: a tile's rows of q and grad_out, their lse and delta, then the keys and values of its steps,
as many steps ahead as shared memory has room for. Two multiply, 64 rows each. Beside a step's scores and the
gradients of its weights they still multiply what the step before adds to grad_q, so that weights are computed
beside products.

A tile's rows see their steps in order: the bits are those of the twin in ``tl``.
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

from fsa_core.kernels.block_share import row_shift
from fsa_core.kernels.hopper_query_tiles import bits_of_rows, find_tile, masks_of_half, tile_constants
from fsa_core.kernels.hopper_tiles import (
    COPYING_WARPS,
    ROWS,
    SIDE,
    by_rows,
    copy_rows,
    copy_steps,
    multiplies,
    num_turns,
    store_rows,
    takes_step,
)
from fsa_core.kernels.launch import kernel
from fsa_core.plan import MAX_SORTED, QueryTile, power_of_two, slot_class
from fsa_core.problem import Problem

LOG2_E = gl.constexpr(1.4426950408889634)
# Of a multiplying and of a copying thread; those of the first multiplying group are what is left of 504.
REGISTERS, COPYING_REGISTERS = 216, 72
# With more a tile, sorting what they chose takes what the products gain.
MOST_TOKENS = 32
# Steps in shared memory, beside a tile's rows.
STAGES = 4


@gluon.jit
def _new_shared(dtype: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Room for halves of a tile and for steps of keys and values; what says that they are there, and read.

    As ``hopper_tiles.new_shared`` has it, and beside: what a row has besides its q.
    """
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, HEAD_DIM], k_layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], v_layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [2, SIDE], flat)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [2, SIDE], flat)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], k_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, VALUE_DIM], v_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_ready.index(half), count=32 * COPYING_WARPS)
        mbarrier.init(q_free.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS)
        mbarrier.init(free.index(stage), count=2)
    return (q_tiles, k_tiles, v_tiles, q_ready, q_free, ready, free), (out_tiles, lse_tiles, delta_tiles)


@gluon.jit
def _copy_rows(
    pointers,
    shared,
    beside,
    taken,
    num_tokens,
    num_delta_heads,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
):
    """Begins to copy what the rows of up to TOKENS tokens have; ``taken`` tiles were before this one."""
    q_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    q_tiles, _k, _v, q_ready, q_free, _ready, _free = shared
    out_tiles, lse_tiles, delta_tiles = beside
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [COPYING_WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    for half in gl.static_range(2):
        rows = half * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, layout))
        token = rows // HEADS
        places = token * NUM_Q_HEADS + rows % HEADS
        is_there = (token < TOKENS) & (token < num_tokens)
        flat_rows = half * SIDE + gl.arange(0, SIDE, flat)
        flat_token = flat_rows // HEADS
        flat_is_there = (flat_token < TOKENS) & (flat_token < num_tokens)
        lse_ptrs = lse_ptr + (flat_token * NUM_Q_HEADS + flat_rows % HEADS)
        delta_ptrs = delta_ptr + (flat_token * num_delta_heads + flat_rows % HEADS)
        mbarrier.wait(q_free.index(half), (taken & 1) ^ 1)
        copy_rows(q_ptr, q_tiles.index(half), places * HEAD_DIM, is_there, HEAD_DIM, layout)
        copy_rows(grad_out_ptr, out_tiles.index(half), places * VALUE_DIM, is_there, VALUE_DIM, layout)
        async_copy.async_copy_global_to_shared(lse_tiles.index(half), lse_ptrs, flat_is_there)
        async_copy.async_copy_global_to_shared(delta_tiles.index(half), delta_ptrs, flat_is_there)
        # Every thread arrives when its own copies have.
        async_copy.mbarrier_arrive(q_ready.index(half), increment_count=False)


@gluon.jit
def _copy_tiles(
    pointers,
    lists,
    where,
    shared,
    beside,
    num_work,
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
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
):
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    n = 0
    taken = 0
    for turn in range(0, num_turns(num_work)):
        head, first, end, _shift, k_length, first_row, entry, _whole, num_steps, is_asked = find_tile(
            turn, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE,
            TOKENS, MAX_SHARED,
        )  # fmt: skip
        if is_asked:
            first_head = head * HEADS_PER_PAIR
            first_place = first.to(gl.int64) * NUM_Q_HEADS + first_head
            first_delta = first.to(gl.int64) * num_delta_heads + (first_head - first_delta_head)
            row_pointers = (
                q_ptr + first_place * HEAD_DIM, grad_out_ptr + first_place * VALUE_DIM,
                lse_ptr + first_place, delta_ptr + first_delta,
            )  # fmt: skip
            _copy_rows(
                row_pointers, shared, beside, taken, end - first, num_delta_heads, NUM_Q_HEADS,
                HEADS_PER_PAIR, TOKENS, HEAD_DIM, VALUE_DIM,
            )  # fmt: skip
            taken += 1
            copy_steps(
                k_ptr + first_row * HEAD_DIM, v_ptr + first_row * VALUE_DIM, lists[0] + entry, shared, n,
                num_steps, k_length, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_SIZE,
            )  # fmt: skip
            n += num_steps


@gluon.jit
def _weights(scores, shift, chose, last_key, blocks_ptr, step, num_whole, scale, BLOCK_SIZE: gl.constexpr):
    """Those of a step's keys: 0 in rows that did not choose the block, and where a row does not see a key."""
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    weights = gl.exp2(scores * (scale * LOG2_E) - gl.where(chose, shift, float("inf"))[:, None])
    if step >= num_whole:
        first_key = gl.load(blocks_ptr + step // PARTS) * BLOCK_SIZE + step % PARTS * SIDE
        keys = first_key + gl.arange(0, SIDE, gl.SliceLayout(0, scores.type.layout))
        weights = gl.where(keys[None, :] <= last_key[:, None], weights, 0.0)
    return weights


@gluon.jit
def _add_steps(
    blocks_ptr,
    masks_ptr,
    shared,
    q,
    grad_out,
    shift,
    delta,
    n,
    num_steps,
    num_whole,
    last_key,
    tile_bit,
    half_bits,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """grad_q [SIDE, HEAD_DIM] of half a tile over its steps, not scaled; arguments as of ``attend_steps``."""
    _q, k_tiles, v_tiles, _q_ready, _q_free, ready, free = shared
    dtype: gl.constexpr = k_tiles.dtype
    row_layout: gl.constexpr = shift.type.layout
    scores_layout: gl.constexpr = row_layout.parent
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    zeros = gl.zeros([SIDE, SIDE], gl.float32, scores_layout)
    grad_q = gl.zeros([SIDE, HEAD_DIM], gl.float32, grad_layout)
    if num_steps > 0:
        stage = n % STAGES
        chose = ((gl.load(masks_ptr) >> tile_bit) & 1) != 0
        mask = gl.load(masks_ptr + 1 // PARTS, mask=num_steps > 1, other=0)
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        fence_async_shared()
        k, v = k_tiles.index(stage).permute([1, 0]), v_tiles.index(stage).permute([1, 0])
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        grad_weights = warpgroup_mma(grad_out, v, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = _weights(scores, shift, chose, last_key, blocks_ptr, 0, num_whole, scale, BLOCK_SIZE)
        grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
        grad_scores = weights * (grad_weights - delta[:, None])
        left = gl.convert_layout(grad_scores.to(dtype), left_layout)
        skipped = 0
        for step in range(1, num_steps):
            chose = ((mask >> tile_bit) & 1) != 0
            is_taken = takes_step(mask, half_bits, skipped, STAGES)
            # On its way while this step is computed.
            mask = gl.load(masks_ptr + (step + 1) // PARTS, mask=step + 1 < num_steps, other=0)
            step_stage = (n + step) % STAGES
            mbarrier.wait(ready.index(step_stage), ((n + step) // STAGES) & 1)
            if is_taken:
                fence_async_shared()
                k, v = k_tiles.index(step_stage).permute([1, 0]), v_tiles.index(step_stage).permute([1, 0])
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                grad_weights = warpgroup_mma(grad_out, v, zeros, use_acc=False, is_async=True)
                grad_q = warpgroup_mma(left, k_tiles.index(stage), grad_q, is_async=True)
                scores = warpgroup_mma_wait(2, deps=[scores])
                weights = _weights(
                    scores, shift, chose, last_key, blocks_ptr, step, num_whole, scale, BLOCK_SIZE
                )
                grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
                grad_scores = weights * (grad_weights - delta[:, None])
                grad_q = warpgroup_mma_wait(0, deps=[grad_q])
                mbarrier.arrive(free.index(stage), count=1)
                stage = step_stage
                skipped = 0
                left = gl.convert_layout(grad_scores.to(dtype), left_layout)
            else:
                mbarrier.arrive(free.index(step_stage), count=1)
                skipped += 1
        grad_q = warpgroup_mma(left, k_tiles.index(stage), grad_q)
        mbarrier.arrive(free.index(stage), count=1)
    return grad_q


@gluon.jit
def _add_tiles(
    grad_q_ptr,
    lists,
    where,
    shared,
    beside,
    num_work,
    scale,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    IS_PAIR: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """grad_q of half of the rows of each tile."""
    q_tiles, _k, _v, q_ready, q_free, _ready, _free = shared
    out_tiles, lse_tiles, delta_tiles = beside
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    tile_token = (HALF * SIDE + gl.arange(0, SIDE, row_layout)) // HEADS_PER_PAIR
    tile_bit, half_bits = bits_of_rows(tile_token, TOKENS, HEADS_PER_PAIR, IS_PAIR, HALF)
    first_token = where[0][0]
    n = 0
    taken = 0
    for turn in range(0, num_turns(num_work)):
        head, first, end, q_shift, k_length, _row, entry, num_whole, num_steps, is_asked = find_tile(
            turn, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE,
            TOKENS, MAX_SHARED,
        )  # fmt: skip
        if is_asked:
            # Keys past the end of the sequence come after every token.
            last_key = first + tile_token + q_shift if CAUSAL else tile_token * 0 + k_length - 1
            mbarrier.wait(q_ready.index(HALF), taken & 1)
            taken += 1
            q = q_tiles.index(HALF)
            shift = row_shift(lse_tiles.index(HALF).load(row_layout))
            delta = delta_tiles.index(HALF).load(row_layout)
            grad_q = _add_steps(
                lists[0] + entry, masks_of_half(lists[1], entry, MAX_SHARED, IS_PAIR, HALF), shared, q,
                out_tiles.index(HALF), shift, delta, n, num_steps, num_whole, last_key, tile_bit, half_bits,
                scale, HEAD_DIM, BLOCK_SIZE, STAGES,
            )  # fmt: skip
            n += num_steps
            first_place = first.to(gl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR
            # Where q was.
            grad_rows = by_rows(grad_q * scale, q)
            mbarrier.arrive(q_free.index(HALF), count=1)
            # A tile at the border of a group of tokens is walked by both groups; each writes its own.
            store_rows(
                grad_q_ptr + first_place * HEAD_DIM, grad_rows, first_token - first, end - first, NUM_Q_HEADS,
                HEADS_PER_PAIR, TOKENS, HALF,
            )  # fmt: skip


@partial(kernel, jit=gluon.jit)
def of_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    order_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    first_token,
    num_tokens,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_head,
    first_delta_head,
    num_delta_heads,
    num_asked,
    num_heads,
    is_ordered,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    IS_PAIR: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
):
    """Arguments as of ``_of_tiles``, and what else ``hopper_query_tiles.attend`` has."""
    shared, beside = _new_shared(q_ptr.dtype.element_ty, HEAD_DIM, VALUE_DIM, STAGES)
    pointers = (q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr)
    lists = (blocks_ptr, masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr)
    tokens = (first_token, num_tokens, num_sequences, search_steps)
    where = (tokens, first_tile, num_asked, num_tiles, first_head, is_ordered)
    num_work = num_asked * num_heads
    gl.warp_specialize(
        [
            (_add_tiles, (
                grad_q_ptr, lists, where, shared, beside, num_work, scale, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, BLOCK_SIZE, CAUSAL, TOKENS,
                MAX_SHARED, IS_PAIR, STAGES, gl.constexpr(0),
            )),
            (_add_tiles, (
                grad_q_ptr, lists, where, shared, beside, num_work, scale, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, BLOCK_SIZE, CAUSAL, TOKENS,
                MAX_SHARED, IS_PAIR, STAGES, gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, lists, where, shared, beside, num_work, first_delta_head, num_delta_heads,
                NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM,
                VALUE_DIM, BLOCK_SIZE, TOKENS, MAX_SHARED,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def fills(problem: Problem) -> bool:
    """Whether a tile of ROWS rows may be taken, and is faster than the twin's of half as many."""
    p = problem
    tokens = ROWS // p.heads_per_pair
    is_full = 1 <= tokens <= MOST_TOKENS and power_of_two(tokens) * slot_class(p.num_slots) <= MAX_SORTED
    return multiplies(p) and is_full and p.block_size >= SIDE.value


def constants(tile: QueryTile) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_of_tiles``."""
    return {
        **tile_constants(tile), "STAGES": STAGES, "REGISTERS": REGISTERS,
        "COPYING_REGISTERS": COPYING_REGISTERS, "num_warps": 4,
    }  # fmt: skip

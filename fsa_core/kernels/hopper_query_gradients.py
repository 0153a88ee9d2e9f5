"""What kernels that make the gradient of q from tiles have in common on Hopper, in Gluon.

A program is three groups of four warps and takes every so many-th tile of 128 rows, as in ``hopper_tiles``.
One group copies: a tile's rows of q and grad_out, their lse and delta, then the keys and values of its steps,
as many steps ahead as shared memory has room for. Two multiply, 64 rows each. Beside a step's scores and the
gradients of its weights they still multiply what the step before adds to grad_q, so that weights are computed
beside products.

Where nobody needs delta before (MAKES_DELTA), the multiplying groups make it, from rows that they read anyway
and from those of out, which take the places of two steps' values.

A tile's rows see their steps in order: the bits are those of the twins in ``tl``, and delta's are those of
``delta._delta``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, copy_rows, first_key_of, seen_keys, takes_step

LOG2_E = gl.constexpr(1.4426950408889634)
# Of a multiplying and of a copying thread; those of the first multiplying group are what is left of 504.
REGISTERS, COPYING_REGISTERS = gl.constexpr(208), gl.constexpr(88)
# Steps in shared memory, beside a tile's rows.
STAGES = gl.constexpr(4)


@gluon.jit
def new_gradient_shared(dtype: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Room for halves of a tile and for steps of keys and values; what says that they are there, and read.

    As ``hopper_tiles.new_shared`` has it, and beside: what a row has besides its q.
    """
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, HEAD_DIM], k_layout)
    grad_out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], v_layout)
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
    return (q_tiles, k_tiles, v_tiles, q_ready, q_free, ready, free), (grad_out_tiles, lse_tiles, delta_tiles)


@gluon.jit
def copy_gradient_rows(
    pointers,
    shared,
    beside,
    taken,
    n,
    num_tokens,
    num_delta_heads,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    MAKES_DELTA: gl.constexpr,
):
    """Begins to copy what the rows of up to TOKENS tokens have; ``taken`` tiles were before, and ``n`` steps.

    Either delta, or rows of out, which are two steps more.
    """
    q_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    q_tiles, _k, v_tiles, q_ready, q_free, ready, free = shared
    grad_out_tiles, lse_tiles, delta_tiles = beside
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
        mbarrier.wait(q_free.index(half), (taken & 1) ^ 1)
        copy_rows(q_ptr, q_tiles.index(half), places * HEAD_DIM, is_there, HEAD_DIM, layout)
        copy_rows(grad_out_ptr, grad_out_tiles.index(half), places * VALUE_DIM, is_there, VALUE_DIM, layout)
        async_copy.async_copy_global_to_shared(lse_tiles.index(half), lse_ptrs, flat_is_there)
        if not MAKES_DELTA:
            delta_ptrs = delta_ptr + (flat_token * num_delta_heads + flat_rows % HEADS)
            async_copy.async_copy_global_to_shared(delta_tiles.index(half), delta_ptrs, flat_is_there)
        # Every thread arrives when its own copies have.
        async_copy.mbarrier_arrive(q_ready.index(half), increment_count=False)
        if MAKES_DELTA:
            step = n + half
            mbarrier.wait(free.index(step % STAGES), ((step // STAGES) & 1) ^ 1)
            copy_rows(out_ptr, v_tiles.index(step % STAGES), places * VALUE_DIM, is_there, VALUE_DIM, layout)
            async_copy.mbarrier_arrive(ready.index(step % STAGES), increment_count=False)


@gluon.jit
def find_delta(
    grad_lse_ptr,
    delta_ptr,
    num_delta_heads,
    shared,
    grad_out_tile,
    n,
    first_asked,
    end_asked,
    with_grad_lse,
    row_layout: gl.constexpr,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HALF: gl.constexpr,
):
    """delta [SIDE] of half of a tile's rows, written for its tokens from ``first_asked`` to ``end_asked``.

    From grad_out, which is there, and out, of which ``copy_gradient_rows`` made two steps after ``n``.
    """
    _q, _k, v_tiles, _q_ready, _q_free, ready, free = shared
    rows = HALF * SIDE + gl.arange(0, SIDE, row_layout)
    token = rows // HEADS
    asked = (token < TOKENS) & (token >= first_asked) & (token < end_asked)
    is_given = asked & (with_grad_lse != 0)
    grad_lse = gl.load(grad_lse_ptr + (token * NUM_Q_HEADS + rows % HEADS), mask=is_given, other=0.0)
    delta = grad_lse
    # A thread adds up what ``delta._delta`` has it add up, in the same order.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    for half in gl.static_range(2):
        step = n + half
        mbarrier.wait(ready.index(step % STAGES), (step // STAGES) & 1)
        if half == HALF:
            out = v_tiles.index(step % STAGES).load(layout).to(gl.float32)
            total = gl.sum(out * grad_out_tile.load(layout).to(gl.float32), 1)
            delta = gl.convert_layout(total, row_layout) - grad_lse
        mbarrier.arrive(free.index(step % STAGES), count=1)
    gl.store(delta_ptr + (token * num_delta_heads + rows % HEADS), delta, mask=asked)
    return delta


@gluon.jit
def _weights(
    scores,
    shift,
    chose,
    last_key,
    blocks_ptr,
    step,
    first_whole,
    num_whole,
    scale,
    BLOCK_SIZE: gl.constexpr,
    REACH: gl.constexpr,
):
    """Those of a step's keys: 0 in rows that did not choose the block, and where a row does not see a key."""
    if BLOCK_SIZE:
        shift = gl.where(chose, shift, float("inf"))
    weights = gl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    if (step >= num_whole) | (step < first_whole):
        seen = seen_keys(first_key_of(blocks_ptr, step, BLOCK_SIZE), last_key, REACH)
        weights = gl.where(seen, weights, 0.0)
    return weights


@gluon.jit
def add_gradient_steps(
    blocks_ptr,
    masks_ptr,
    shared,
    q,
    grad_out,
    shift,
    delta,
    n,
    num_steps,
    first_whole,
    num_whole,
    last_key,
    tile_bit,
    half_bits,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    REACH: gl.constexpr,
):
    """grad_q [SIDE, HEAD_DIM] of half a tile over its steps, not scaled; arguments as of ``attend_steps``."""
    _q, k_tiles, v_tiles, _q_ready, _q_free, ready, free = shared
    dtype: gl.constexpr = k_tiles.dtype
    row_layout: gl.constexpr = shift.type.layout
    scores_layout: gl.constexpr = row_layout.parent
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    SELECTS: gl.constexpr = BLOCK_SIZE > 0
    zeros = gl.zeros([SIDE, SIDE], gl.float32, scores_layout)
    grad_q = gl.zeros([SIDE, HEAD_DIM], gl.float32, grad_layout)
    if num_steps > 0:
        stage = n % STAGES
        chose = last_key >= 0
        mask = gl.full([], 0, gl.int64)
        if SELECTS:
            chose = ((gl.load(masks_ptr) >> tile_bit) & 1) != 0
            mask = gl.load(masks_ptr + 1 // PARTS, mask=num_steps > 1, other=0)
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        fence_async_shared()
        k, v = k_tiles.index(stage).permute([1, 0]), v_tiles.index(stage).permute([1, 0])
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        grad_weights = warpgroup_mma(grad_out, v, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = _weights(
            scores, shift, chose, last_key, blocks_ptr, 0, first_whole, num_whole, scale, BLOCK_SIZE, REACH
        )
        grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
        grad_scores = weights * (grad_weights - delta[:, None])
        left = gl.convert_layout(grad_scores.to(dtype), left_layout)
        skipped = 0
        for step in range(1, num_steps):
            is_taken = True
            if SELECTS:
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
                    scores,
                    shift,
                    chose,
                    last_key,
                    blocks_ptr,
                    step,
                    first_whole,
                    num_whole,
                    scale,
                    BLOCK_SIZE,
                    REACH,
                )
                grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
                grad_scores = weights * (grad_weights - delta[:, None])
                grad_q = warpgroup_mma_wait(0, deps=[grad_q])
                mbarrier.arrive(free.index(stage), count=1)
                stage = step_stage
                skipped = 0
                left = gl.convert_layout(grad_scores.to(dtype), left_layout)
            elif SELECTS:
                mbarrier.arrive(free.index(step_stage), count=1)
                skipped += 1
        grad_q = warpgroup_mma(left, k_tiles.index(stage), grad_q)
        mbarrier.arrive(free.index(stage), count=1)
    return grad_q

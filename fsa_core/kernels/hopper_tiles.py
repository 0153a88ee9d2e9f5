"""What kernels that attend by query tiles have in common on Hopper, in Gluon.

A program is three groups of four warps and takes every so many-th tile of 128 rows. One group copies: the
rows of q, then the keys and values that the tile walks, SIDE keys a step, as many steps ahead as shared
memory has room for, also while the tile before is still being attended. Two attend, 64 rows each. While they
multiply a step's scores they still multiply the values of the step before (FlashAttention-3, arXiv
2407.08608), so that the softmax is computed beside products.

A tile's rows see their steps in order, whatever else there is: the bits are those of the tile alone, and
those of the twins in ``tl``, which add in the same order.
"""

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

from fsa_core.problem import Problem

DIMS = (64, 128)
# Rows of an attending group, and keys of a step.
SIDE = gl.constexpr(64)
ROWS = 2 * SIDE.value
COPYING_WARPS = gl.constexpr(4)
# Of an attending and of a copying thread; those of the first attending group are what is left of 504.
REGISTERS, COPYING_REGISTERS = gl.constexpr(216), gl.constexpr(72)
STAGES = gl.constexpr(4)


def multiplies(problem: Problem) -> bool:
    """Whether heads are as wide as kernels for Hopper multiply them, in 16 bits."""
    p = problem
    return p.head_dim in DIMS and p.value_dim in DIMS and p.dtype.itemsize == 2


def exact_dims(constants: dict[str, Any]) -> dict[str, Any]:
    """Constants of a twin without those of dims that are padded: here none is."""
    return {name: value for name, value in constants.items() if not name.endswith("_PADDED")}


@gluon.jit
def new_shared(dtype: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Room for q and for steps of keys and values; what says that they are there, and that they are read.

    And beside: where each half of a tile turns its answer into rows.
    """
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, HEAD_DIM], k_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], k_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, VALUE_DIM], v_layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], v_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=32 * COPYING_WARPS)
    mbarrier.init(q_free, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS)
        mbarrier.init(free.index(stage), count=2)
    return (q_tiles, k_tiles, v_tiles, q_ready, q_free, ready, free), out_tiles


@gluon.jit
def nth_work(turn, gets_shorter):
    """Which piece of work a program takes as its ``turn``-th. Where pieces get shorter, it has those of turns
    forth and back: no program has the longest every time.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    goes_back = (turn % 2 == 1) & (gets_shorter != 0)
    return turn * programs + gl.where(goes_back, programs - 1 - place, place)


@gluon.jit
def num_turns(num_work):
    """How many pieces of work a program takes at most; the last one may not be there."""
    return (num_work + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def copy_rows(x_ptr, tile, row_offsets, row_mask, DIM: gl.constexpr, layout: gl.constexpr):
    """Begins to copy the rows that lie at ``row_offsets``; rows that are not are zeros.

    For offsets that are the same again and again: then only ``x_ptr`` is added to them. See ``gather_rows``.
    """
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    offsets = row_offsets[:, None] + dims[None, :]
    async_copy.async_copy_global_to_shared(tile, x_ptr + offsets, row_mask[:, None])


@gluon.jit
def gather_rows(x_ptr, tile, row_offsets, row_mask, DIM: gl.constexpr, layout: gl.constexpr):
    """``copy_rows`` of rows that lie elsewhere each time: each has one address, and all of it lies behind."""
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    row_ptrs = x_ptr + row_offsets[:, None]
    async_copy.async_copy_global_to_shared(tile, row_ptrs + dims[None, :], row_mask[:, None])


@gluon.jit
def copy_queries(
    q_ptr,
    shared,
    num_tokens,
    q_phase,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Begins to copy HEADS heads of up to TOKENS tokens, those that ``num_tokens`` says there are."""
    q_tiles, _k, _v, q_ready, q_free, _ready, _free = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [COPYING_WARPS, 1], [1, 0])
    mbarrier.wait(q_free, q_phase)
    for half in gl.static_range(2):
        rows = half * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, layout))
        token = rows // HEADS
        places = (token * NUM_Q_HEADS + rows % HEADS) * HEAD_DIM
        is_there = (token < TOKENS) & (token < num_tokens)
        copy_rows(q_ptr, q_tiles.index(half), places, is_there, HEAD_DIM, layout)
    # Every thread arrives when its own copies have.
    async_copy.mbarrier_arrive(q_ready, increment_count=False)


@gluon.jit
def copy_steps(
    k_ptr,
    v_ptr,
    blocks_ptr,
    shared,
    n,
    num_steps,
    num_keys,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Begins to copy a tile's steps in turn, as soon as there is room; ``n`` were before them.

    A step is a part of the block that ``blocks_ptr`` lists. BLOCK_SIZE 0: of all keys, one after another.
    """
    _q, k_tiles, v_tiles, _q_ready, _q_free, ready, free = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [COPYING_WARPS, 1], [1, 0])
    NUM_STAGES: gl.constexpr = k_tiles.shape[0]
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    keys = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    # A block a thread: what all share would go to a uniform register, and be waited for at once.
    thread = gl.arange(0, 2, gl.BlockedLayout([1], [32], [COPYING_WARPS], [0]))
    listed = thread * 0
    if BLOCK_SIZE:
        listed = gl.load(blocks_ptr + thread, mask=thread * PARTS < num_steps, other=0)
    for step in range(num_steps):
        stage = (n + step) % NUM_STAGES
        first_key = step * SIDE
        if BLOCK_SIZE:
            block = gl.sum(gl.where(thread == 0, listed, 0), 0)
            first_key = block * BLOCK_SIZE + step % PARTS * SIDE
            # On its way while this one's keys are.
            next_step = step + 1
            exists = next_step + thread * PARTS < num_steps
            listed = gl.load(blocks_ptr + (next_step // PARTS + thread), mask=exists, other=0)
        exists = keys < num_keys - first_key
        first_row = first_key.to(gl.int64) * NUM_KV_HEADS
        mbarrier.wait(free.index(stage), (((n + step) // NUM_STAGES) & 1) ^ 1)
        k_rows, v_rows = keys * (NUM_KV_HEADS * HEAD_DIM), keys * (NUM_KV_HEADS * VALUE_DIM)
        copy_rows(k_ptr + first_row * HEAD_DIM, k_tiles.index(stage), k_rows, exists, HEAD_DIM, layout)
        copy_rows(v_ptr + first_row * VALUE_DIM, v_tiles.index(stage), v_rows, exists, VALUE_DIM, layout)
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)


@gluon.jit
def _weigh(scores, row_max, row_sum, chose, scale, SELECTS: gl.constexpr):
    """Online softmax over a step: the new maximum and sum, its weights, and what older sums shrink by."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    if SELECTS:
        new_max = gl.where(chose, new_max, row_max)
    finite = gl.where(new_max == float("-inf"), 0.0, new_max)
    shift = finite * scale
    if SELECTS:
        # A row that did not choose the block subtracts infinity: its weights are 0.
        shift = gl.where(chose, shift, float("inf"))
    weights = gl.exp2(scores * scale - shift[:, None])
    # Exactly 1 where nothing is larger: a step that a row sees nothing of changes no bit of it.
    shrink = gl.exp2((row_max - finite) * scale)
    return new_max, row_sum * shrink + gl.sum(weights, 1), weights, shrink


@gluon.jit
def first_key_of(blocks_ptr, step, BLOCK_SIZE: gl.constexpr):
    """The first key of a step, which ``blocks_ptr`` lists, or of all keys if BLOCK_SIZE is 0."""
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    if BLOCK_SIZE:
        return gl.load(blocks_ptr + step // PARTS) * BLOCK_SIZE + step % PARTS * SIDE
    else:
        return step * SIDE


@gluon.jit
def seen_keys(first_key, last_key, REACH: gl.constexpr):
    """[SIDE rows, SIDE keys]: whether a row sees a key, from ``first_key`` on, up to its ``last_key``.

    That is the last REACH keys of those, or all of them if REACH is 0.
    """
    keys = first_key + gl.arange(0, SIDE, gl.SliceLayout(0, last_key.type.layout.parent))
    seen = keys[None, :] <= last_key[:, None]
    if REACH:
        seen = seen & (keys[None, :] > last_key[:, None] - REACH)
    return seen


@gluon.jit
def takes_step(mask, half_bits, skipped, STAGES: gl.constexpr):
    """Whether half of a tile multiplies a step, or passes over it, as none of its rows chose the block.

    What it multiplied last is kept in shared memory until it multiplies again, and all others' room goes
    round meanwhile: so many it may pass over, no more.
    """
    return ((mask & half_bits) != 0) | (skipped >= STAGES - 2)


@gluon.jit
def attend_steps(
    blocks_ptr,
    masks_ptr,
    shared,
    n,
    num_steps,
    first_whole,
    num_whole,
    last_key,
    tile_bit,
    half_bits,
    scale,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    REACH: gl.constexpr,
    HALF: gl.constexpr,
):
    """Half of a tile's rows, from row HALF * SIDE on, over its steps: their maximum, sum and weighted values.

    ``last_key`` is the last that a row sees: of steps from ``num_whole`` on some rows do not see all keys. It
    sees REACH keys up to that, of steps before ``first_whole`` some do not see all; or all, if REACH is 0.
    Where steps are of listed blocks, bit ``tile_bit`` of a block's mask says whether a row chose it, and
    ``half_bits`` are those of all these rows.
    """
    q_tiles, k_tiles, v_tiles, _q_ready, q_free, ready, free = shared
    dtype: gl.constexpr = q_tiles.dtype
    row_layout: gl.constexpr = last_key.type.layout
    scores_layout: gl.constexpr = row_layout.parent
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    SELECTS: gl.constexpr = BLOCK_SIZE > 0
    zeros = gl.zeros([SIDE, SIDE], gl.float32, scores_layout)
    row_max = gl.full([SIDE], float("-inf"), gl.float32, row_layout)
    row_sum = gl.zeros([SIDE], gl.float32, row_layout)
    acc = gl.zeros([SIDE, VALUE_DIM], gl.float32, out_layout)
    # In registers: shared memory is read for the keys alone, and may take the next tile's q.
    q = q_tiles.index(HALF).load(gl.DotOperandLayout(0, scores_layout, 2))
    mbarrier.arrive(q_free, count=1)
    if num_steps > 0:
        stage = n % STAGES
        mask = gl.full([], 0, gl.int64)
        chose = last_key >= 0
        if SELECTS:
            chose = ((gl.load(masks_ptr) >> tile_bit) & 1) != 0
            mask = gl.load(masks_ptr + 1 // PARTS, mask=num_steps > 1, other=0)
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        fence_async_shared()
        scores = warpgroup_mma(q, k_tiles.index(stage).permute([1, 0]), zeros, use_acc=False)
        if (num_whole <= 0) | (first_whole > 0):
            seen = seen_keys(first_key_of(blocks_ptr, 0, BLOCK_SIZE), last_key, REACH)
            scores = gl.where(seen, scores, float("-inf"))
        row_max, row_sum, weights, shrink = _weigh(scores, row_max, row_sum, chose, scale, SELECTS)
        left = gl.convert_layout(weights.to(dtype), weights_layout)
        skipped = 0
        for step in range(1, num_steps):
            step_stage = (n + step) % STAGES
            mbarrier.wait(ready.index(step_stage), ((n + step) // STAGES) & 1)
            is_taken = True
            if SELECTS:
                is_taken = takes_step(mask, half_bits, skipped, STAGES)
            if is_taken:
                if SELECTS:
                    chose = ((mask >> tile_bit) & 1) != 0
                fence_async_shared()
                k = k_tiles.index(step_stage).permute([1, 0])
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                acc = warpgroup_mma(left, v_tiles.index(stage), acc, is_async=True)
                if SELECTS:
                    # Loaded here, beside products: the fence waits for whatever was begun before it.
                    mask = gl.load(masks_ptr + (step + 1) // PARTS, mask=step + 1 < num_steps, other=0)
                scores = warpgroup_mma_wait(1, deps=[scores])
                if (step >= num_whole) | (step < first_whole):
                    seen = seen_keys(first_key_of(blocks_ptr, step, BLOCK_SIZE), last_key, REACH)
                    scores = gl.where(seen, scores, float("-inf"))
                row_max, row_sum, weights, shrink = _weigh(scores, row_max, row_sum, chose, scale, SELECTS)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(stage), count=1)
                stage = step_stage
                skipped = 0
                left = gl.convert_layout(weights.to(dtype), weights_layout)
                acc *= gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
            elif SELECTS:
                mask = gl.load(masks_ptr + (step + 1) // PARTS, mask=step + 1 < num_steps, other=0)
                mbarrier.arrive(free.index(step_stage), count=1)
                skipped += 1
        acc = warpgroup_mma(left, v_tiles.index(stage), acc)
        mbarrier.arrive(free.index(stage), count=1)
    return row_max, row_sum, acc


@gluon.jit
def share_of(row_sum):
    """What to multiply a row's weighted values by; 1 where it has no weights."""
    return 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)


@gluon.jit
def by_rows(x, tile):
    """x [SIDE, dim] so that a thread has 16 bytes of a row; by way of ``tile``, in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile.store(x.to(tile.dtype))
    return tile.load(layout)


@gluon.jit
def store_rows(
    x_ptr,
    x,
    first_asked,
    end_asked,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Writes half of a tile's rows (``by_rows``), of its tokens from ``first_asked`` to ``end_asked``."""
    DIM: gl.constexpr = x.shape[1]
    rows = HALF * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, x.type.layout))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, x.type.layout))
    token = rows // HEADS
    places = (token * NUM_Q_HEADS + rows % HEADS) * DIM
    asked = (token < TOKENS) & (token >= first_asked) & (token < end_asked)
    gl.store(x_ptr + (places[:, None] + dims[None, :]), x, mask=asked[:, None])


@gluon.jit
def store_out(
    out_ptr,
    tile,
    acc,
    share,
    first_asked,
    end_asked,
    NUM_Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Writes half of a tile's answer, of its tokens from ``first_asked`` to ``end_asked``."""
    out = acc * gl.convert_layout(share, gl.SliceLayout(1, acc.type.layout))[:, None]
    store_rows(out_ptr, by_rows(out, tile), first_asked, end_asked, NUM_Q_HEADS, HEADS, TOKENS, HALF)


@gluon.jit
def bits_of_half(TOKENS: gl.constexpr, HEADS: gl.constexpr, HALF: gl.constexpr):
    """The bits, in a block's mask, of the tokens that have rows in half of a tile of TOKENS."""
    FIRST: gl.constexpr = HALF * SIDE // HEADS
    LAST: gl.constexpr = (HALF * SIDE + SIDE - 1) // HEADS
    bits = gl.full([], 0, gl.int64)
    for token in gl.static_range(FIRST, LAST + 1):
        if token < TOKENS:
            bits |= gl.full([], 1, gl.int64) << token
    return bits

"""The gradients of keys that a query sees one run of, for Hopper: what ``_of_keys`` computes, in Gluon.

A program is three groups of four warps and has 128 windows. One group copies: the windows' keys and values,
then the rows that see them, SIDE a step, as many steps ahead as shared memory has room for. Two multiply, 64
windows each. Both walk the same steps, so that each row is copied once, and the matrix units have work while
one of them computes weights.

Steps and their order are those of ``_of_keys``, and so are the bits where it has as many rows a step.
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
from fsa_core.kernels.hopper_tiles import copy_rows, exact_dims
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.kernels.windows import (
    Tile,
    TileShape,
    Windows,
    first_position,
    seeing_tokens,
    split_steps,
    walk_constants,
)
from fsa_core.problem import Problem

WINDOWS = gl.constexpr(2 * SIDE.value)
SHAPE = TileShape(SIDE.value, WINDOWS.value, num_warps=4, num_stages=4)
# Of a multiplying and of a copying thread; those of the first multiplying group are what is left of 504.
REGISTERS, COPYING_REGISTERS = 240, 24


@gluon.jit
def _token_of(n, walk, PARTS: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr):
    """The first token of the n-th step that is walked, from the first of the tile's steps on."""
    last_whole, num_whole, start_cut, num_steps, _num_walked = walk
    step = n // PARTS
    step = gl.where(step < num_whole, last_whole - step * SPLITS, start_cut + step - num_whole)
    # Those before the whole ones are counted on behind the last.
    return gl.where(step < num_steps, step, step - num_steps) * TOKENS


@gluon.jit
def _copy_steps(
    pointers,
    tiles,
    blocks,
    walk,
    num_windows,
    num_tokens,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    PARTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Fills the stages in turn; all parts of a group under one step's tokens, then the next.

    Pointers are to the tile's first window, and to the first row that sees any of it.
    """
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    q_tiles, out_tiles, lse_tiles, delta_tiles, ready, free = tiles
    k_blocks, v_blocks = blocks
    num_walked = walk[4]
    # A warp copies two rows at once, 16 bytes a thread. A thread's rows are neighbours: where they lie
    # differs by constants, which take no registers.
    layout: gl.constexpr = gl.BlockedLayout([8, 8], [2, 16], [COPYING_WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    # Nothing of its own says that these are there: what arrives with the first step's rows is every copy that
    # a thread has begun.
    if num_walked > 0:
        for half in gl.static_range(2):
            windows = half * SIDE + rows
            k_rows, v_rows = windows * (NUM_KV_HEADS * HEAD_DIM), windows * (NUM_KV_HEADS * VALUE_DIM)
            copy_rows(k_ptr, k_blocks.index(half), k_rows, windows < num_windows, HEAD_DIM, layout)
            copy_rows(v_ptr, v_blocks.index(half), v_rows, windows < num_windows, VALUE_DIM, layout)
    flat_rows = gl.arange(0, SIDE, flat)
    tile_token, flat_token = rows // HEADS, flat_rows // HEADS
    tile_head, flat_head = rows % HEADS, flat_rows % HEADS
    places = tile_token * NUM_Q_HEADS + tile_head
    flat_places = flat_token * NUM_Q_HEADS + flat_head
    for n in range(num_walked):
        stage = n % STAGES
        token = _token_of(n, walk, PARTS, TOKENS, SPLITS)
        part_head = n % PARTS * HEADS
        row = token.to(gl.int64) * NUM_Q_HEADS + part_head
        num_here = gl.minimum(num_tokens - token, TOKENS)
        exists, flat_exists = tile_token < num_here, flat_token < num_here
        mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
        q_places, out_places = places * HEAD_DIM, places * VALUE_DIM
        copy_rows(q_ptr + row * HEAD_DIM, q_tiles.index(stage), q_places, exists, HEAD_DIM, layout)
        out_ptr = grad_out_ptr + row * VALUE_DIM
        copy_rows(out_ptr, out_tiles.index(stage), out_places, exists, VALUE_DIM, layout)
        lse_ptrs, delta_ptrs = lse_ptr + row + flat_places, delta_ptr + row + flat_places
        async_copy.async_copy_global_to_shared(lse_tiles.index(stage), lse_ptrs, flat_exists)
        async_copy.async_copy_global_to_shared(delta_tiles.index(stage), delta_ptrs, flat_exists)
        # Every thread arrives when its own copies have.
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)


@gluon.jit
def _hide(weights, ahead, row_tokens, STRIDE: gl.constexpr, REACH: gl.constexpr):
    """Weights without those of windows that a row does not see; the first row is ``ahead`` of the position
    that sees the first window.
    """
    starts = gl.arange(0, SIDE, gl.SliceLayout(1, SCORES)) * STRIDE
    aheads = ahead + row_tokens.load(gl.SliceLayout(0, SCORES))
    seen = starts[:, None] <= aheads[None, :]
    if REACH:
        seen &= (starts + REACH * STRIDE)[:, None] > aheads[None, :]
    return gl.where(seen, weights, 0.0)


@gluon.jit
def _add_products(grad_k, grad_v, weights, grad_weights, delta_tile, q, grad_out):
    """Adds the share of a tile's rows, that of grad_k not scaled."""
    dtype: gl.constexpr = q.dtype
    k_operand: gl.constexpr = gl.DotOperandLayout(0, grad_k.type.layout, 2)
    v_operand: gl.constexpr = gl.DotOperandLayout(0, grad_v.type.layout, 2)
    delta = delta_tile.load(gl.SliceLayout(0, SCORES))
    grad_weights = warpgroup_mma_wait(0, deps=[grad_weights])
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_v = warpgroup_mma(gl.convert_layout(weights.to(dtype), v_operand), grad_out, grad_v, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores.to(dtype), k_operand), q, grad_k, is_async=True)
    grad_v, grad_k = warpgroup_mma_wait(0, deps=[grad_v, grad_k])
    return grad_k, grad_v


@gluon.jit
def _add_half(
    tiles,
    blocks,
    walk,
    tile_ahead,
    row_tokens,
    answers,
    scale,
    PARTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Writes the gradients of the tile's windows from HALF * SIDE on.

    The tile's first step is ``tile_ahead`` of the position that sees its first window.
    """
    q_tiles, out_tiles, lse_tiles, delta_tiles, ready, free = tiles
    k_blocks, v_blocks = blocks
    k, v = k_blocks.index(HALF), v_blocks.index(HALF)
    grad_k, grad_v = zero_gradients(HEAD_DIM, VALUE_DIM)
    for n in range(walk[4]):
        stage = n % STAGES
        # Of the tile's steps this half sees fewer, and more of them whole.
        ahead = tile_ahead - HALF * SIDE * STRIDE + _token_of(n, walk, PARTS, TOKENS, SPLITS)
        sees_any, is_cut = ahead + TOKENS > 0, ahead < (SIDE - 1) * STRIDE
        if REACH:
            sees_any &= ahead < (SIDE - 1 + REACH) * STRIDE
            is_cut |= ahead + TOKENS > REACH * STRIDE
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        if sees_any:
            fence_async_shared()
            q, grad_out = q_tiles.index(stage), out_tiles.index(stage)
            scores, grad_weights = begin_scores(k, v, q, grad_out)
            weights = weigh(scores, lse_tiles.index(stage), scale)
            if is_cut:
                weights = _hide(weights, ahead, row_tokens, STRIDE, REACH)
            delta_tile = delta_tiles.index(stage)
            grad_k, grad_v = _add_products(grad_k, grad_v, weights, grad_weights, delta_tile, q, grad_out)
        mbarrier.arrive(free.index(stage), count=1)
    grad_k_ptr, grad_v_ptr, num_heads, num_windows = answers
    k_row, v_row = num_heads * HEAD_DIM, num_heads * VALUE_DIM
    store_keys(grad_k_ptr + HALF * SIDE * k_row, num_windows - HALF * SIDE, grad_k * scale, k_row, False)
    store_keys(grad_v_ptr + HALF * SIDE * v_row, num_windows - HALF * SIDE, grad_v, v_row, False)


@partial(kernel, jit=gluon.jit)
def of_windows(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
    num_sequences,
    search_steps,
    first_head,
    num_heads,
    split_rows,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEADS: gl.constexpr,
    PARTS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
):
    """One split's share of grad_k and grad_v of a tile of WINDOWS; arguments as of ``_of_keys``."""
    # The first windows of all heads come first: most queries see them.
    tile = gl.program_id(0) // (num_heads * SPLITS)
    split = gl.program_id(0) // num_heads % SPLITS
    head = gl.program_id(0) % num_heads
    kv_head = first_head + head
    sequence, first, end = tile_tokens(tile, cu_seqlens_cmp_ptr, num_sequences, search_steps, WINDOWS)
    if first >= end:
        return
    q_start = gl.load(cu_seqlens_q_ptr + sequence)
    q_length = gl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    q_position = gl.load(cu_seqlens_k_ptr + sequence + 1) - gl.load(cu_seqlens_k_ptr + sequence) - q_length
    first_window = first - gl.load(cu_seqlens_cmp_ptr + sequence)
    num_windows = gl.minimum(WINDOWS, end - first)
    last_window = first_window + num_windows - 1
    start, start_all, end_all, end_any = seeing_tokens(
        first_window, last_window, q_position, q_length, KERNEL_SIZE, STRIDE, REACH
    )
    num_steps, last_whole, num_whole, start_cut, end_cut = split_steps(
        start, start_all, end_all, end_any, split, TOKENS, SPLITS
    )
    # Where there are fewer steps than splits, the last ones start behind their ends.
    num_walked = (num_whole + gl.maximum(end_cut - start_cut, 0)) * PARTS
    walk = (last_whole, num_whole, start_cut, num_steps, num_walked)

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    k_blocks = gl.allocate_shared_memory(dtype, [2, SIDE, HEAD_DIM], k_layout)
    v_blocks = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], v_layout)
    blocks = (k_blocks, v_blocks)
    tiles = new_row_tiles(dtype, HEAD_DIM, VALUE_DIM, STAGES, 2)
    first_row = (q_start + start).to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
    first_key = first.to(gl.int64) * NUM_KV_HEADS + kv_head
    pointers = (
        q_ptr + first_row * HEAD_DIM, k_ptr + first_key * HEAD_DIM, v_ptr + first_key * VALUE_DIM,
        grad_out_ptr + first_row * VALUE_DIM, lse_ptr + first_row, delta_ptr + first_row,
    )  # fmt: skip
    place = split.to(gl.int64) * split_rows + first.to(gl.int64) * num_heads + head
    answers = (grad_k_ptr + place * HEAD_DIM, grad_v_ptr + place * VALUE_DIM, num_heads, num_windows)
    # In shared memory, since registers have no room for what few steps need.
    token_of_row = gl.arange(0, SIDE, gl.SliceLayout(0, SCORES)) // HEADS
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_tokens = gl.allocate_shared_memory(gl.int32, [SIDE], flat, token_of_row)
    ahead = start + q_position - first_position(first_window, KERNEL_SIZE, STRIDE)
    gl.warp_specialize(
        [
            (_add_half, (
                tiles, blocks, walk, ahead, row_tokens, answers, scale, PARTS, HEAD_DIM, VALUE_DIM, STRIDE,
                REACH, TOKENS, STAGES, SPLITS, gl.constexpr(0),
            )),
            (_add_half, (
                tiles, blocks, walk, ahead, row_tokens, answers, scale, PARTS, HEAD_DIM, VALUE_DIM, STRIDE,
                REACH, TOKENS, STAGES, SPLITS, gl.constexpr(1),
            )),
            (_copy_steps, (
                pointers, tiles, blocks, walk, num_windows, q_length - start, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS, PARTS, HEAD_DIM, VALUE_DIM, TOKENS, STAGES, SPLITS,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def tile_of(problem: Problem) -> Tile:
    return SHAPE.full_tile(problem.group_size)


def constants(problem: Problem, windows: Windows, tile: Tile) -> dict[str, Any]:
    """What is compiled into the kernel, but SPLITS; rows and keys are always as many."""
    shared = exact_dims(walk_constants(problem, windows, tile))
    sized = {name: value for name, value in shared.items() if name not in ("ROWS", "KEYS")}
    return sized | {"REGISTERS": REGISTERS, "COPYING_REGISTERS": COPYING_REGISTERS}

"""The gradient of q where a query sees one run of windows, for Hopper.

What ``interval_gradients._of_queries`` computes, in Gluon.
"""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.block_share import row_shift
from fsa_core.kernels.hopper_query_gradients import (
    add_gradient_steps,
    copy_gradient_rows,
    find_delta,
    new_gradient_shared,
)
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, by_rows, copy_steps, num_turns, store_rows
from fsa_core.kernels.hopper_windows import find_window_tile
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.windows import visible_windows

# Of a multiplying and of a copying thread, which finds out more than that of listed steps; those of the first
# multiplying group are what is left of 504.
REGISTERS, COPYING_REGISTERS = gl.constexpr(200), gl.constexpr(104)


@gluon.jit
def _copy_tiles(
    pointers,
    starts,
    where,
    shared,
    beside,
    num_work,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
):
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    n = 0
    taken = 0
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, _shift, _window, first_row, num_windows, steps, exists = find_window_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, REACH, TOKENS
        )
        if exists:
            num_steps = steps[2]
            first_place = first.to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
            row_pointers = (
                q_ptr + first_place * HEAD_DIM, out_ptr + first_place * VALUE_DIM,
                grad_out_ptr + first_place * VALUE_DIM, lse_ptr + first_place, delta_ptr,
            )  # fmt: skip
            copy_gradient_rows(
                row_pointers, shared, beside, taken, n, q_end - first, NUM_Q_HEADS, NUM_Q_HEADS, GROUP_SIZE,
                TOKENS, HEAD_DIM, VALUE_DIM, True,
            )  # fmt: skip
            taken += 1
            n += 2
            # They lie one after another: there is no list.
            copy_steps(
                k_ptr + first_row * HEAD_DIM, v_ptr + first_row * VALUE_DIM, starts[0], shared, n, num_steps,
                num_windows, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, 0,
            )  # fmt: skip
            n += num_steps


@gluon.jit
def _add_tiles(
    grad_lse_ptr,
    delta_ptr,
    grad_q_ptr,
    starts,
    where,
    shared,
    beside,
    num_work,
    scale,
    with_grad_lse,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
    HALF: gl.constexpr,
):
    """grad_q and delta of half of the rows of each tile."""
    q_tiles, _k, _v, q_ready, q_free, _ready, _free = shared
    grad_out_tiles, lse_tiles, _delta = beside
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    tile_token = (HALF * SIDE + gl.arange(0, SIDE, row_layout)) // GROUP_SIZE
    n = 0
    taken = 0
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, q_shift, first_window, _row, _windows, steps, exists = find_window_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, REACH, TOKENS
        )
        if exists:
            first_whole, num_whole, num_steps = steps
            last_window = visible_windows(first + tile_token + q_shift, KERNEL_SIZE, STRIDE) - 1
            last_window -= first_window
            mbarrier.wait(q_ready.index(HALF), taken & 1)
            taken += 1
            q = q_tiles.index(HALF)
            grad_out = grad_out_tiles.index(HALF)
            shift = row_shift(lse_tiles.index(HALF).load(row_layout))
            first_place = first.to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
            delta = find_delta(
                grad_lse_ptr + first_place, delta_ptr + first_place, NUM_Q_HEADS, shared, grad_out, n, 0,
                q_end - first, with_grad_lse, row_layout, NUM_Q_HEADS, GROUP_SIZE, TOKENS, HALF,
            )  # fmt: skip
            n += 2
            grad_q = add_gradient_steps(
                starts[0], starts[0], shared, q, grad_out, shift, delta, n, num_steps,
                first_whole, num_whole, last_window, tile_token, 0, scale, HEAD_DIM, 0, REACH,
            )  # fmt: skip
            n += num_steps
            # Where q was.
            grad_rows = by_rows(grad_q * scale, q)
            mbarrier.arrive(q_free.index(HALF), count=1)
            store_rows(
                grad_q_ptr + first_place * HEAD_DIM, grad_rows, 0, q_end - first, NUM_Q_HEADS, GROUP_SIZE,
                TOKENS, HALF,
            )  # fmt: skip


@partial(kernel, jit=gluon.jit)
def of_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_q_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
    num_sequences,
    search_steps,
    with_grad_lse,
    num_tiles,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Arguments as of ``_of_queries``, but delta is written, and how many tiles to take under every KV head.

    delta as of ``hopper_tile_query_gradients.of_tiles``, which MAKES_DELTA.
    """
    shared, beside = new_gradient_shared(q_ptr.dtype.element_ty, HEAD_DIM, VALUE_DIM)
    pointers = (q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr)
    starts = (cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr)
    where = (num_tiles, num_sequences, search_steps)
    num_work = num_tiles * NUM_KV_HEADS
    gl.warp_specialize(
        [
            (_add_tiles, (
                grad_lse_ptr, delta_ptr, grad_q_ptr, starts, where, shared, beside, num_work, scale,
                with_grad_lse, NUM_Q_HEADS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, KERNEL_SIZE, STRIDE, REACH,
                TOKENS, gl.constexpr(0),
            )),
            (_add_tiles, (
                grad_lse_ptr, delta_ptr, grad_q_ptr, starts, where, shared, beside, num_work, scale,
                with_grad_lse, NUM_Q_HEADS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, KERNEL_SIZE, STRIDE, REACH,
                TOKENS, gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, starts, where, shared, beside, num_work, NUM_Q_HEADS, NUM_KV_HEADS, GROUP_SIZE,
                HEAD_DIM, VALUE_DIM, KERNEL_SIZE, STRIDE, REACH, TOKENS,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip

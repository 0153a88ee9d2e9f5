"""Attention over compressed keys, or the last of all, for Hopper: ``compressed._attend_windows`` in Gluon."""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.hopper_tiles import (
    COPYING_REGISTERS,
    COPYING_WARPS,
    REGISTERS,
    ROWS,
    SIDE,
    attend_steps,
    copy_queries,
    copy_steps,
    multiplies,
    new_shared,
    nth_work,
    num_turns,
    share_of,
    store_out,
)
from fsa_core.kernels.launch import Kernel, kernel, multiprocessors
from fsa_core.kernels.primitives import natural_lse
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.kernels.windows import Windows, visible_windows
from fsa_core.problem import Problem


@gluon.jit
def find_window_tile(
    turn,
    num_work,
    starts,
    where,
    NUM_KV_HEADS: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Of this program's ``turn``-th tile: its KV head, its first token and the end of its sequence's, what
    turns a token into a position; the first window that any token of it sees, its row and how many there are
    from it on in the sequence; of the steps from there on, from which to which every token sees them whole,
    and how many any sees; whether there is such a tile.
    """
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr = starts
    num_tiles, num_sequences, search_steps = where
    work = nth_work(turn, 1)
    exists = work < num_work
    work = gl.minimum(work, num_work - 1)
    # The last tiles see most: begun last, they would be what all others wait for.
    tile = num_tiles - 1 - work // NUM_KV_HEADS
    kv_head = work % NUM_KV_HEADS
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    k_length = gl.load(cu_seqlens_k_ptr + sequence + 1) - gl.load(cu_seqlens_k_ptr + sequence)
    q_shift = k_length - q_end
    first_row = gl.load(cu_seqlens_cmp_ptr + sequence).to(gl.int64) * NUM_KV_HEADS + kv_head
    num_windows = visible_windows(k_length - 1, KERNEL_SIZE, STRIDE)
    last = gl.minimum(first + TOKENS, q_end) - 1
    first_visible = visible_windows(first + q_shift, KERNEL_SIZE, STRIDE)
    num_visible = visible_windows(last + q_shift, KERNEL_SIZE, STRIDE)
    first_step, first_whole = first * 0, first * 0
    if REACH:
        first_step = gl.maximum(first_visible - REACH, 0) // SIDE
        first_whole = (gl.maximum(num_visible - REACH, 0) + SIDE - 1) // SIDE - first_step
    first_window = first_step * SIDE
    first_row += first_window.to(gl.int64) * NUM_KV_HEADS
    steps = (first_whole, first_visible // SIDE - first_step, (num_visible + SIDE - 1) // SIDE - first_step)
    exists &= first < q_end
    return kv_head, first, q_end, q_shift, first_window, first_row, num_windows - first_window, steps, exists


@gluon.jit
def _copy_tiles(
    pointers,
    starts,
    where,
    shared,
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
    q_ptr, k_ptr, v_ptr = pointers
    n = 0
    q_phase = 1
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, _shift, _window, first_row, num_windows, steps, exists = find_window_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, REACH, TOKENS
        )
        if exists:
            num_steps = steps[2]
            first_q_row = first.to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
            copy_queries(
                q_ptr + first_q_row * HEAD_DIM, shared, q_end - first, q_phase, NUM_Q_HEADS, GROUP_SIZE,
                TOKENS, HEAD_DIM,
            )  # fmt: skip
            q_phase ^= 1
            # They lie one after another: there is no list.
            copy_steps(
                k_ptr + first_row * HEAD_DIM, v_ptr + first_row * VALUE_DIM, starts[0], shared, n, num_steps,
                num_windows, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, 0,
            )  # fmt: skip
            n += num_steps


@gluon.jit
def _attend_tiles(
    answers,
    starts,
    where,
    shared,
    out_tiles,
    num_work,
    num_q_tokens,
    scale,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    REACH: gl.constexpr,
    TOKENS: gl.constexpr,
    WITH_SHARES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Half of the rows of each tile: out, lse in natural units and, WITH_SHARES, what selection needs."""
    out_ptr, lse_ptr, row_max_ptr, row_share_ptr = answers
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    tile_rows = HALF * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, scores_layout))
    tile_token = tile_rows // GROUP_SIZE
    group_head = tile_rows % GROUP_SIZE
    n = 0
    q_phase = 0
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, q_shift, first_window, _row, _windows, steps, exists = find_window_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, REACH, TOKENS
        )
        if exists:
            first_whole, num_whole, num_steps = steps
            last_window = visible_windows(first + tile_token + q_shift, KERNEL_SIZE, STRIDE) - 1
            last_window -= first_window
            mbarrier.wait(shared[3], q_phase)
            q_phase ^= 1
            row_max, row_sum, acc = attend_steps(
                starts[0], starts[0], shared, n, num_steps, first_whole, num_whole, last_window, tile_token,
                0, scale, VALUE_DIM, 0, REACH, HALF,
            )  # fmt: skip
            n += num_steps
            share = share_of(row_sum)
            first_place = first.to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
            store_out(
                out_ptr + first_place * VALUE_DIM, out_tiles.index(HALF), acc, share, 0, q_end - first,
                NUM_Q_HEADS, GROUP_SIZE, TOKENS, HALF,
            )  # fmt: skip
            row_mask = (tile_token < TOKENS) & (first + tile_token < q_end)
            lse = natural_lse(row_max, row_sum, scale)
            gl.store(lse_ptr + first_place + tile_token * NUM_Q_HEADS + group_head, lse, mask=row_mask)
            if WITH_SHARES:
                # Head by head, as selection reads them: its tiles are tokens of one head.
                places = (kv_head * GROUP_SIZE + group_head).to(gl.int64) * num_q_tokens + first + tile_token
                finite = gl.where(row_max == float("-inf"), 0.0, row_max)
                gl.store(row_max_ptr + places, finite * scale, mask=row_mask)
                gl.store(row_share_ptr + places, share, mask=row_mask)


@partial(kernel, jit=gluon.jit)
def attend_windows(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_max_ptr,
    row_share_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
    num_q_tokens,
    num_sequences,
    search_steps,
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
    WITH_SHARES: gl.constexpr,
):
    """Arguments as of ``_attend_windows``, and how many tiles to take under every KV head."""
    shared, out_tiles = new_shared(q_ptr.dtype.element_ty, HEAD_DIM, VALUE_DIM)
    pointers, answers = (q_ptr, k_ptr, v_ptr), (out_ptr, lse_ptr, row_max_ptr, row_share_ptr)
    starts = (cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr)
    where = (num_tiles, num_sequences, search_steps)
    num_work = num_tiles * NUM_KV_HEADS
    gl.warp_specialize(
        [
            (_attend_tiles, (
                answers, starts, where, shared, out_tiles, num_work, num_q_tokens, scale, NUM_Q_HEADS,
                NUM_KV_HEADS, GROUP_SIZE, VALUE_DIM, KERNEL_SIZE, STRIDE, REACH, TOKENS, WITH_SHARES,
                gl.constexpr(0),
            )),
            (_attend_tiles, (
                answers, starts, where, shared, out_tiles, num_work, num_q_tokens, scale, NUM_Q_HEADS,
                NUM_KV_HEADS, GROUP_SIZE, VALUE_DIM, KERNEL_SIZE, STRIDE, REACH, TOKENS, WITH_SHARES,
                gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, starts, where, shared, num_work, NUM_Q_HEADS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM,
                VALUE_DIM, KERNEL_SIZE, STRIDE, REACH, TOKENS,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def takes(problem: Problem) -> bool:
    """Whether heads are of a width that is multiplied, in one tile, and there is enough for full tiles."""
    p = problem
    has_many = p.num_q_tokens * p.group_size > ROWS * p.num_sequences
    return multiplies(p) and p.group_size <= ROWS and has_many


def launch(
    walk: Kernel, problem: Problem, windows: Windows, arguments: tuple[Any, ...], **constants: bool
) -> None:
    """Launches a kernel whose programs take every so many-th tile, as many as run at once."""
    p, tokens = problem, ROWS // problem.group_size
    num_tiles = p.num_q_tokens // tokens + p.num_sequences
    programs = min(multiprocessors(arguments[0].device), num_tiles * p.num_kv_heads)
    walk[(programs,)](
        *arguments, num_tiles, NUM_Q_HEADS=p.num_q_heads, NUM_KV_HEADS=p.num_kv_heads,
        GROUP_SIZE=p.group_size, HEAD_DIM=p.head_dim, VALUE_DIM=p.value_dim, KERNEL_SIZE=windows.kernel_size,
        STRIDE=windows.stride, REACH=windows.reach, TOKENS=tokens, **constants, num_warps=4,
    )  # fmt: skip

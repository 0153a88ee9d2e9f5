"""Attention over compressed keys, query tile by query tile: one launch, an online softmax, no workspace.

A tile is a few consecutive tokens of one sequence with the query heads of a KV head. Every window before a
bound is seen by all of its tokens, and only those of the last steps need a mask; in sliding-window attention,
whose windows are keys, those of the first steps as well. Tiles are cut from the start of each sequence, so an
answer is bitwise the same alone and in any company.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LOG2_E, finite, natural_lse, reciprocal
from fsa_core.kernels.query_tiles import load_block
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.kernels.windows import (
    RowShares,
    Tile,
    TileShape,
    Windows,
    last_tiles_first,
    visible_windows,
    walk_constants,
)
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, search_steps

# K and V of a step where heads are wide: shared memory holds two steps.
WIDE_STEP_BYTES = 32 * 1024
FEW_ROWS = 64


@triton.jit
def _add_step(row_max, row_sum, acc, scores, v, scale, CUT: tl.constexpr, WITH_VALUES: tl.constexpr):
    """Online softmax: some more keys. CUT: some scores are -inf."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = finite(new_max) if CUT else new_max
    weights = tl.exp2(scores * scale - (shift * scale)[:, None])
    # Exactly 1 where nothing is larger: a step that a row sees nothing of changes no bit of it.
    shrink = tl.exp2((row_max - shift) * scale)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if WITH_VALUES:
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return new_max, row_sum, acc


@triton.jit
def _add_cut_steps(
    row_max,
    row_sum,
    acc,
    q,
    k_ptrs,
    v_ptrs,
    begin,
    end,
    step_rows,
    key,
    num_windows,
    visible,
    scale,
    dim_mask,
    value_mask,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    REACH: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_VALUES: tl.constexpr,
):
    """Steps of windows that some tokens do not see, or that do not exist."""
    # Not with one stage: ptxas 12.8 loses where v lies in shared memory when a loop has one place for it, and
    # v is narrower than k.
    for step in tl.range(begin, end, num_stages=STAGES):
        first_key = step * step_rows
        windows = step * key.shape[0] + key
        exists = windows < num_windows
        k = load_block(k_ptrs + first_key * HEAD_DIM, exists[None, :], dim_mask[:, None], True, True)
        scores = tl.dot(q, k, input_precision="tf32x3")
        v = k
        seen = windows[None, :] < visible[:, None]
        if REACH:
            seen &= windows[None, :] >= visible[:, None] - REACH
        scores = tl.where(seen, scores, float("-inf"))
        if WITH_VALUES:
            v = load_block(v_ptrs + first_key * VALUE_DIM, exists[:, None], value_mask[None, :], True, True)
        row_max, row_sum, acc = _add_step(row_max, row_sum, acc, scores, v, scale, True, WITH_VALUES)
    return row_max, row_sum, acc


@kernel
def _attend_windows(
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
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    REACH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    WITH_SHARES: tl.constexpr,
):
    first, q_end, q_shift, window_start, num_windows = last_tiles_first(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr, num_sequences, search_steps, KERNEL_SIZE,
        STRIDE, TOKENS,
    )  # fmt: skip
    if first >= q_end:
        return
    kv_head = tl.program_id(1) // PARTS
    rows = tl.arange(0, ROWS)
    tile_token = rows // HEADS
    group_head = tl.program_id(1) % PARTS * HEADS + rows % HEADS
    tokens = first + tile_token
    row_mask = (tile_token < TOKENS) & (tokens < q_end) & (group_head < GROUP_SIZE)
    heads = kv_head * GROUP_SIZE + group_head
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    places = tokens.to(tl.int64) * NUM_Q_HEADS + heads
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)

    visible = visible_windows(tokens + q_shift, KERNEL_SIZE, STRIDE)
    last = tl.minimum(first + TOKENS, q_end) - 1
    num_visible = visible_windows(last + q_shift, KERNEL_SIZE, STRIDE)
    end_whole = visible_windows(first + q_shift, KERNEL_SIZE, STRIDE) // KEYS
    end_step = (num_visible + KEYS - 1) // KEYS
    first_step, first_whole = 0, 0
    if REACH:
        first_step = tl.maximum(visible_windows(first + q_shift, KERNEL_SIZE, STRIDE) - REACH, 0) // KEYS
        first_whole = (tl.maximum(num_visible - REACH, 0) + KEYS - 1) // KEYS
        end_whole = tl.maximum(end_whole, first_whole)
    mask_dims: tl.constexpr = HEAD_DIM != HEAD_DIM_PADDED
    mask_values: tl.constexpr = VALUE_DIM != VALUE_DIM_PADDED
    key = tl.arange(0, KEYS)
    k_offsets = (key * NUM_KV_HEADS * HEAD_DIM)[None, :] + dims[:, None]
    v_offsets = (key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = window_start.to(tl.int64) * NUM_KV_HEADS + kv_head
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    step_rows = tl.full((), KEYS * NUM_KV_HEADS, tl.int64)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
    if REACH:
        row_max, row_sum, acc = _add_cut_steps(
            row_max, row_sum, acc, q, k_ptr + k_offsets, v_ptr + v_offsets, first_step,
            tl.minimum(first_whole, end_step), step_rows, key, num_windows, visible, scale, dim_mask,
            value_mask, HEAD_DIM, VALUE_DIM, REACH, STAGES, WITH_VALUES,
        )  # fmt: skip
    for step in tl.range(first_whole, end_whole, num_stages=STAGES):
        first_key = step * step_rows
        k = load_block(k_ptr + first_key * HEAD_DIM + k_offsets, True, dim_mask[:, None], False, mask_dims)
        scores = tl.dot(q, k, input_precision="tf32x3")
        v = k
        if WITH_VALUES:
            v_ptrs = v_ptr + first_key * VALUE_DIM + v_offsets
            v = load_block(v_ptrs, True, value_mask[None, :], False, mask_values)
        row_max, row_sum, acc = _add_step(row_max, row_sum, acc, scores, v, scale, False, WITH_VALUES)
    row_max, row_sum, acc = _add_cut_steps(
        row_max, row_sum, acc, q, k_ptr + k_offsets, v_ptr + v_offsets, end_whole, end_step, step_rows, key,
        num_windows, visible, scale, dim_mask, value_mask, HEAD_DIM, VALUE_DIM, REACH, STAGES, WITH_VALUES,
    )  # fmt: skip
    if WITH_VALUES:
        acc *= reciprocal(row_sum)[:, None]
        tl.store(
            out_ptr + places[:, None] * VALUE_DIM + value_dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & value_mask[None, :],
        )
        tl.store(lse_ptr + places, natural_lse(row_max, row_sum, scale), mask=row_mask)
    if WITH_SHARES:
        # Head by head, as selection reads them: its tiles are tokens of one head.
        places = heads.to(tl.int64) * num_q_tokens + tokens
        tl.store(row_max_ptr + places, finite(row_max) * scale, mask=row_mask)
        tl.store(row_share_ptr + places, reciprocal(row_sum), mask=row_mask)


def compressed_attention_forward(
    problem: Problem, windows: Windows, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, RowShares]:
    """Attention over the windows whose last key a query sees, and what selection needs of its rows.

    problem: dense attention over windows, with at least one query. q: [num_q_tokens, num_q_heads, head_dim],
    k_cmp: [num_windows, num_kv_heads, head_dim], v_cmp: [num_windows, num_kv_heads, value_dim], contiguous.
    Returns out [num_q_tokens, num_q_heads, value_dim] in q's dtype and lse float32 [num_q_tokens,
    num_q_heads], natural log; 0 and -inf where nothing is seen.
    """
    tensors = (q, k_cmp, v_cmp, *windows.starts)
    out, lse, row_max, row_share = _replayed(tensors, problem, windows.sizes, True, True)
    return out, lse, RowShares(row_max, row_share)


def row_shares(problem: Problem, windows: Windows, q: torch.Tensor, k_cmp: torch.Tensor) -> RowShares:
    """The shares of ``compressed_attention_forward`` alone, without values."""
    return RowShares(*_replayed((q, k_cmp, k_cmp, *windows.starts), problem, windows.sizes, False, True))


def window_attention_forward(
    problem: Problem, windows: Windows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse as ``compressed_attention_forward``, of windows with a ``reach``."""
    out, lse = _replayed((q, k, v, *windows.starts), problem, windows.sizes, True, False)
    return out, lse


def _forward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    sizes: tuple[int, int, int],
    with_values: bool,
    with_shares: bool,
) -> None:
    """Of q, k, v and the starts of windows of ``sizes``: out and lse, then what selection needs of rows."""
    p, (q, k, v, *starts) = problem, tensors
    windows = Windows.of(sizes, starts)
    of_rows: list[torch.Tensor] = []
    if with_values:
        of_rows = [memory.answer(*q.shape[:2], p.value_dim), memory.answer(*q.shape[:2], dtype=torch.float32)]
    shares = [memory.answer(q.shape[1], q.shape[0], dtype=torch.float32) for _ in range(2 * with_shares)]
    # What is not asked for is not written.
    answers = ((of_rows or shares), (shares or of_rows))
    arguments = (
        q, k, v, *answers[0], *answers[1], *windows.starts, p.softmax_scale * LOG2_E.value, p.num_q_tokens,
        p.num_sequences, search_steps(p.num_sequences),
    )  # fmt: skip
    if with_values and hopper.runs_on(q.device) and _launch_on_hopper(p, windows, arguments, with_shares):
        return
    tile = _tile(p, windows)
    num_tiles = p.num_q_tokens // tile.tokens + p.num_sequences
    _attend_windows[num_tiles, p.num_kv_heads * tile.parts](
        *arguments, **walk_constants(p, windows, tile), WITH_VALUES=with_values, WITH_SHARES=with_shares,
        num_warps=tile.num_warps,
    )  # fmt: skip


_replayed = Replayed(_forward)


def _launch_on_hopper(
    problem: Problem, windows: Windows, arguments: tuple[Any, ...], with_shares: bool
) -> bool:
    """Launches the kernel for Hopper alone, if it takes the problem, and says so."""
    from fsa_core.kernels import hopper_windows

    if not hopper_windows.takes(problem):
        return False
    hopper_windows.launch(hopper_windows.attend_windows, problem, windows, arguments, WITH_SHARES=with_shares)
    return True


def _tile(problem: Problem, windows: Windows) -> Tile:
    """On an H200, 64K tokens, D = 128: 2.40 ms where 128 rows and 128 keys of 8 warps take 2.86 (g = 4).

    Each row of K and V is then read half as often. Few rows, as in decode, would leave most of them empty;
    steps are as long there, so bits are the same. A sliding window is short: fewer rows see fewer keys in
    vain, 0.91 ms and not 1.13.
    """
    p = problem
    widest_bytes = padded_dim(max(p.head_dim, p.value_dim)) * p.dtype.itemsize
    if widest_bytes > 256:
        shape = TileShape(64, max(WIDE_STEP_BYTES // (2 * widest_bytes), 16), num_warps=4)
    elif p.dtype.itemsize == 4:
        shape = TileShape(128, 128)
    elif windows.reach or p.num_q_tokens * p.group_size <= FEW_ROWS * p.num_sequences:
        shape = TileShape(FEW_ROWS, 64, num_warps=4, num_stages=3)
    else:
        shape = TileShape(256, 64, num_warps=16, num_stages=3)
    return shape.tile(p.group_size)

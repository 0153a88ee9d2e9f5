"""Gradients of attention in which a query sees one run of windows: compressed and sliding-window attention.

With P = exp(scores - lse) computed again and delta = sum(out * grad_out) - grad_lse:

    grad_v = P^T grad_out        grad_scores = P * (grad_out v^T - delta)
    grad_k = grad_scores^T q * scale        grad_q = grad_scores k * scale

Two walks, seven matrix products: query tiles over the windows that they see, for grad_q, and tiles of windows
over the query tiles that see them (interval_key_gradients.py), all heads of the group, for grad_k and grad_v.
Sums stay in registers, and no mask is needed but at the ends of what a tile walks.

No atomics, and tiles are cut from where their own sequence, or what sees them of it, starts: the bits are the
same on every run, alone and in any company.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.block_share import add_share, row_shift
from fsa_core.kernels.delta import write_delta
from fsa_core.kernels.interval_key_gradients import gradients_of_keys
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.query_tiles import load_block
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.kernels.windows import (
    TileShape,
    Windows,
    gradient_shape,
    last_tiles_first,
    visible_windows,
    walk_constants,
)
from fsa_core.problem import Problem
from fsa_core.sizes import search_steps


@triton.jit
def _add_cut_shares(
    grad_q,
    q,
    grad_out,
    k_ptrs,
    v_ptrs,
    shift,
    delta,
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
):
    """Adds those of steps of windows that some tokens do not see, or that do not exist."""
    # Not with one stage, which ptxas 12.8 gets wrong where v is narrower than k.
    for step in tl.range(begin, end, num_stages=STAGES):
        first_key = step * step_rows
        windows = step * key.shape[0] + key
        exists = (windows < num_windows)[:, None]
        k = load_block(k_ptrs + first_key * HEAD_DIM, exists, dim_mask, True, True)
        v = load_block(v_ptrs + first_key * VALUE_DIM, exists, value_mask, True, True)
        seen = windows[None, :] < visible[:, None]
        if REACH:
            seen &= windows[None, :] >= visible[:, None] - REACH
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, seen, scale, True)
    return grad_q


@kernel
def _of_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
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
):
    """grad_q of a tile, as ``_attend_windows`` cuts and walks them."""
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
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    value_mask = (value_dims < VALUE_DIM)[None, :]
    places = tokens.to(tl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE + group_head
    q_places = places[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_places, mask=row_mask[:, None] & dim_mask, other=0.0)
    out_places = places[:, None] * VALUE_DIM + value_dims[None, :]
    grad_out = tl.load(grad_out_ptr + out_places, mask=row_mask[:, None] & value_mask, other=0.0)
    shift = row_shift(tl.load(lse_ptr + places, mask=row_mask, other=float("-inf")))
    delta = tl.load(delta_ptr + places, mask=row_mask, other=0.0)

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
    k_offsets = (key * NUM_KV_HEADS * HEAD_DIM)[:, None] + dims[None, :]
    v_offsets = (key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = window_start.to(tl.int64) * NUM_KV_HEADS + kv_head
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    step_rows = tl.full((), KEYS * NUM_KV_HEADS, tl.int64)
    grad_q = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    if REACH:
        grad_q = _add_cut_shares(
            grad_q, q, grad_out, k_ptr + k_offsets, v_ptr + v_offsets, shift, delta, first_step,
            tl.minimum(first_whole, end_step), step_rows, key, num_windows, visible, scale, dim_mask,
            value_mask, HEAD_DIM, VALUE_DIM, REACH, STAGES,
        )  # fmt: skip
    for step in tl.range(first_whole, end_whole, num_stages=STAGES):
        first_key = step * step_rows
        k = load_block(k_ptr + first_key * HEAD_DIM + k_offsets, True, dim_mask, False, mask_dims)
        v = load_block(v_ptr + first_key * VALUE_DIM + v_offsets, True, value_mask, False, mask_values)
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, True, scale, False)
    grad_q = _add_cut_shares(
        grad_q, q, grad_out, k_ptr + k_offsets, v_ptr + v_offsets, shift, delta, end_whole, end_step,
        step_rows, key, num_windows, visible, scale, dim_mask, value_mask, HEAD_DIM, VALUE_DIM, REACH, STAGES,
    )  # fmt: skip
    grad_q *= scale
    tl.store(grad_q_ptr + q_places, grad_q.to(grad_q_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)


def interval_attention_backward(
    problem: Problem,
    windows: Windows,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    *,
    workspace_limit_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, in their shapes and dtypes; tensors as in the forward pass, contiguous.

    k and v may be compressed or not, as ``windows`` says. out, grad_out [num_q_tokens, num_q_heads,
    value_dim] and lse, grad_lse float32 [num_q_tokens, num_q_heads]; grad_lse may be None, for zeros. The
    limit: see ``gradients_of_keys``.
    """
    of_rows = (q, k, v, out, lse, grad_out) if grad_lse is None else (q, k, v, out, lse, grad_out, grad_lse)
    options = (problem, windows.sizes, workspace_limit_bytes)
    grad_q, grad_k, grad_v = _replayed((*of_rows, *windows.starts), *options, grad_lse is not None)
    return grad_q, grad_k, grad_v


def _backward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    sizes: tuple[int, int, int],
    workspace_limit_bytes: int,
    with_grad_lse: bool,
) -> None:
    """The answers of ``interval_attention_backward``, of its tensors and the windows' starts."""
    q, k, v, out, lse, grad_out, *rest = tensors
    grad_lse = rest.pop(0) if with_grad_lse else None
    windows = Windows.of(sizes, rest)
    grads = [memory.answer(*x.shape) for x in (q, k, v)]
    delta = memory.new_empty(*lse.shape, dtype=torch.float32)
    given = (q, k, v, grad_out, lse, delta)
    _gradient_of_queries(problem, windows, given, out, grad_lse, grads[0])
    gradients_of_keys(problem, windows, given, (grads[1], grads[2]), memory, workspace_limit_bytes)


_replayed = Replayed(_backward)


def _gradient_of_queries(
    problem: Problem,
    windows: Windows,
    given: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    grad_q: torch.Tensor,
) -> None:
    """Of q, the first of what is given; all of it as ``_of_queries`` takes it. Writes the last, delta."""
    p = problem
    starts = (*windows.starts, p.softmax_scale, p.num_sequences, search_steps(p.num_sequences))
    if hopper.runs_on(grad_q.device) and _launch_on_hopper(p, windows, given, out, grad_lse, grad_q, starts):
        return
    *_, grad_out, _lse, delta = given
    write_delta(out, grad_out, grad_lse, delta)
    # On an H200, 64K tokens, D = 128, g = 4: 3.16 ms, and 3.93 of 128 rows in 8 warps with 64 keys in two
    # stages; with 128 keys 3.36. In a sliding window of 512: 1.07 and 1.19.
    narrow = TileShape(64, 64, num_warps=4) if windows.reach else TileShape(256, 32, 16, num_stages=3)
    tile = gradient_shape(p, narrow, wide=TileShape(64, 32)).tile(p.group_size)
    num_tiles = p.num_q_tokens // tile.tokens + p.num_sequences
    _of_queries[num_tiles, p.num_kv_heads * tile.parts](
        *given, grad_q, *starts, **walk_constants(p, windows, tile), num_warps=tile.num_warps
    )


def _launch_on_hopper(
    problem: Problem,
    windows: Windows,
    given: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    grad_q: torch.Tensor,
    starts: tuple[Any, ...],
) -> bool:
    """Launches the kernel for Hopper alone, if it takes the problem, and says so."""
    from fsa_core.kernels import hopper_interval_query_gradients, hopper_windows

    if not hopper_windows.takes(problem):
        return False
    q, k, v, grad_out, lse, delta = given
    tensors = (q, k, v, out, grad_out, lse, lse if grad_lse is None else grad_lse, delta, grad_q)
    hopper_windows.launch(
        hopper_interval_query_gradients.of_queries, problem, windows,
        (*tensors, *starts, int(grad_lse is not None)),
    )  # fmt: skip
    return True

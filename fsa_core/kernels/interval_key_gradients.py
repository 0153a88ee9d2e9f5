"""The gradients of keys and values where a query sees one run of windows, as interval_gradients.py has them.

Compressed keys are seen from any distance, the first ones by most queries: one program would walk while all
others have ended. SPLITS programs share a walk then, and their sums are added in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.block_share import row_shift
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LOG2_E
from fsa_core.kernels.query_tiles import load_block
from fsa_core.kernels.replay import Memory
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.kernels.windows import (
    TileShape,
    Windows,
    gradient_shape,
    seeing_tokens,
    split_steps,
    visible_windows,
    walk_constants,
)
from fsa_core.problem import Problem
from fsa_core.sizes import FLOAT32_BYTES, padded_dim, search_steps

# 4 KV heads, or 2 query heads a KV head, then keep an H200 busy at 64K tokens, and shares take 64 MiB.
SPLITS = 4
# Of a program that adds shares: of 128 numbers, 16 bytes of each share a thread.
SUM_ROWS = 4


@triton.jit
def _add_rows(grad_k, grad_v, q, grad_out, k, v, lse, delta, seen, scale, CUT: tl.constexpr):
    """Adds the share of some rows, that of grad_k not scaled. CUT: not all of them see all keys, as ``seen``.

    Keys down, rows across: the weights are then the left operand of the keys' gradients as they are. Rows
    that do not exist are zeros with an lse of -inf, and so have no share.
    """
    scores = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    weights = tl.exp2(scores * (scale * LOG2_E) - row_shift(lse)[None, :])
    if CUT:
        weights = tl.where(seen, weights, 0.0)
    grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision="tf32x3")
    grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="tf32x3")
    grad_scores = (weights * (grad_weights - delta[None, :])).to(k.dtype)
    return tl.dot(grad_scores, q, grad_k, input_precision="tf32x3"), grad_v


@kernel
def _of_keys(
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
    SPLITS: tl.constexpr,
):
    """One split's share of grad_k and grad_v of KEYS windows; 0 of those that nobody sees.

    Of ``num_heads`` KV heads from ``first_head`` on: grad_k [SPLITS, windows, num_heads, head_dim], grad_v
    likewise; ``split_rows`` is windows * num_heads.
    """
    # The first windows of all heads come first: most queries see them.
    tile = tl.program_id(0) // (num_heads * SPLITS)
    split = tl.program_id(0) // num_heads % SPLITS
    head = tl.program_id(0) % num_heads
    kv_head = first_head + head
    sequence, first, end = tile_tokens(tile, cu_seqlens_cmp_ptr, num_sequences, search_steps, KEYS)
    if first >= end:
        return
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_length = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    q_position = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence) - q_length
    first_window = first - tl.load(cu_seqlens_cmp_ptr + sequence)
    last_window = first_window + tl.minimum(KEYS, end - first) - 1
    start, start_all, end_all, end_any = seeing_tokens(
        first_window, last_window, q_position, q_length, KERNEL_SIZE, STRIDE, REACH
    )
    num_steps, last_whole, num_whole, start_cut, end_cut = split_steps(
        start, start_all, end_all, end_any, split, TOKENS, SPLITS
    )

    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    value_mask = (value_dims < VALUE_DIM)[None, :]
    key = tl.arange(0, KEYS)
    windows = first_window + key
    exists = (first + key < end)[:, None]
    first_key = first.to(tl.int64) * NUM_KV_HEADS + kv_head
    k_places = first_key * HEAD_DIM + ((key * NUM_KV_HEADS * HEAD_DIM)[:, None] + dims[None, :])
    v_places = first_key * VALUE_DIM + ((key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :])
    k = tl.load(k_ptr + k_places, mask=exists & dim_mask, other=0.0)
    v = tl.load(v_ptr + v_places, mask=exists & value_mask, other=0.0)

    rows = tl.arange(0, ROWS)
    tile_token, tile_head = rows // HEADS, rows % HEADS
    row_offsets = tile_token * NUM_Q_HEADS + tile_head
    q_offsets = (row_offsets * HEAD_DIM)[:, None] + dims[None, :]
    out_offsets = (row_offsets * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = (q_start + start).to(tl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
    mask_dims: tl.constexpr = HEAD_DIM != HEAD_DIM_PADDED
    mask_values: tl.constexpr = VALUE_DIM != VALUE_DIM_PADDED
    step_rows = tl.full((), TOKENS * NUM_Q_HEADS, tl.int64)
    grad_k = tl.zeros((KEYS, HEAD_DIM_PADDED), tl.float32)
    grad_v = tl.zeros((KEYS, VALUE_DIM_PADDED), tl.float32)
    # All parts of a group under one token tile, then the next.
    for i in tl.range(0, num_whole * PARTS, num_stages=STAGES):
        part_head = i % PARTS * HEADS
        row = first_row + (last_whole - i // PARTS * SPLITS) * step_rows + part_head
        q = load_block(q_ptr + row * HEAD_DIM + q_offsets, True, dim_mask, False, mask_dims)
        grad_out_ptrs = grad_out_ptr + row * VALUE_DIM + out_offsets
        grad_out = load_block(grad_out_ptrs, True, value_mask, False, mask_values)
        lse = tl.load(lse_ptr + row + row_offsets)
        delta = tl.load(delta_ptr + row + row_offsets)
        grad_k, grad_v = _add_rows(grad_k, grad_v, q, grad_out, k, v, lse, delta, True, scale, False)
    # Tokens at both ends, which do not see every window, or which do not exist.
    for i in tl.range(start_cut * PARTS, end_cut * PARTS, num_stages=STAGES):
        step = tl.where(i // PARTS < num_steps, i // PARTS, i // PARTS - num_steps)
        part_head = i % PARTS * HEADS
        row = first_row + step * step_rows + part_head
        token = start + step * TOKENS + tile_token
        row_mask = token < q_length
        of_rows = row_mask[:, None]
        q = load_block(q_ptr + row * HEAD_DIM + q_offsets, of_rows, dim_mask, True, mask_dims)
        grad_out_ptrs = grad_out_ptr + row * VALUE_DIM + out_offsets
        grad_out = load_block(grad_out_ptrs, of_rows, value_mask, True, mask_values)
        lse = tl.load(lse_ptr + row + row_offsets, mask=row_mask, other=float("-inf"))
        delta = tl.load(delta_ptr + row + row_offsets, mask=row_mask, other=0.0)
        visible = visible_windows(token + q_position, KERNEL_SIZE, STRIDE)
        seen = windows[:, None] < visible[None, :]
        if REACH:
            seen &= windows[:, None] >= visible[None, :] - REACH
        grad_k, grad_v = _add_rows(grad_k, grad_v, q, grad_out, k, v, lse, delta, seen, scale, True)
    grad_k *= scale
    places = split.to(tl.int64) * split_rows + (first.to(tl.int64) + key) * num_heads + head
    grad_k_ptrs = grad_k_ptr + places[:, None] * HEAD_DIM + dims[None, :]
    tl.store(grad_k_ptrs, grad_k.to(grad_k_ptr.dtype.element_ty), mask=exists & dim_mask)
    grad_v_ptrs = grad_v_ptr + places[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(grad_v_ptrs, grad_v.to(grad_v_ptr.dtype.element_ty), mask=exists & value_mask)


@kernel
def _sum_splits(
    shares_ptr,
    grad_ptr,
    num_rows,
    first_head,
    num_heads,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of ``num_heads`` heads, shares [SPLITS, windows, heads, DIM] added one by one: in one order always."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    mask = (rows < num_rows)[:, None] & (dims < DIM)[None, :]
    ptrs = shares_ptr + rows.to(tl.int64)[:, None] * DIM + dims[None, :]
    total = tl.load(ptrs, mask=mask)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * num_rows.to(tl.int64) * DIM, mask=mask)
    places = (rows // num_heads).to(tl.int64) * NUM_KV_HEADS + first_head + rows % num_heads
    tl.store(grad_ptr + places[:, None] * DIM + dims[None, :], total.to(grad_ptr.dtype.element_ty), mask=mask)


def gradients_of_keys(
    problem: Problem,
    windows: Windows,
    given: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor, torch.Tensor],
    memory: Memory,
    workspace_limit_bytes: int,
) -> None:
    """Writes those of k and v, the second and the third of what is given; all of it as ``_of_keys`` takes it.

    The splits' shares are of as many KV heads at once as ``workspace_limit_bytes`` hold, or of one.
    """
    p = problem
    if windows.reach:
        _walk(p, windows, given, slice(0, p.num_kv_heads), *grads, splits=1)
        return
    dims = p.head_dim, p.value_dim
    head_bytes = SPLITS * p.num_k_tokens * sum(dims) * FLOAT32_BYTES
    at_once = min(max(workspace_limit_bytes // max(head_bytes, 1), 1), p.num_kv_heads)
    # One place for all, whichever heads are walked.
    places = [memory.new_empty(SPLITS * p.num_k_tokens * at_once * dim, dtype=torch.float32) for dim in dims]
    for first in range(0, p.num_kv_heads, at_once):
        heads = slice(first, min(first + at_once, p.num_kv_heads))
        num_rows = p.num_k_tokens * (heads.stop - first)
        _walk(p, windows, given, heads, *places, splits=SPLITS)
        for shares, grad, dim in zip(places, grads, dims, strict=True):
            if num_rows:
                _sum_splits[(-(-num_rows // SUM_ROWS),)](
                    shares, grad, num_rows, first, heads.stop - first, NUM_KV_HEADS=p.num_kv_heads, DIM=dim,
                    DIM_PADDED=padded_dim(dim), SPLITS=SPLITS, ROWS=SUM_ROWS,
                )  # fmt: skip


def _walk(
    problem: Problem,
    windows: Windows,
    given: tuple[torch.Tensor, ...],
    heads: slice,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    *,
    splits: int,
) -> None:
    p, num_heads = problem, heads.stop - heads.start
    arguments = (
        *given, grad_k, grad_v, *windows.starts, p.softmax_scale, p.num_sequences,
        search_steps(p.num_sequences), heads.start, num_heads, p.num_k_tokens * num_heads,
    )  # fmt: skip
    if hopper.runs_on(grad_k.device) and _launch_on_hopper(p, windows, arguments, num_heads, splits):
        return
    # On an H200, 64K tokens, D = 128, g = 4: 4.9 to 5.0 ms, and 5.5 with two stages; 64 or 256 keys, or 128
    # rows, take longer. In a sliding window of 512: 1.32, and 1.96 in the other shape.
    narrow = TileShape(32, 64, 4, num_stages=3) if windows.reach else TileShape(64, 128, num_stages=3)
    tile = gradient_shape(p, narrow, wide=TileShape(32, 64)).full_tile(p.group_size)
    num_tiles = p.num_k_tokens // tile.keys + p.num_sequences
    _of_keys[(num_tiles * num_heads * splits,)](
        *arguments, **walk_constants(p, windows, tile), SPLITS=splits, num_warps=tile.num_warps
    )


def _launch_on_hopper(
    problem: Problem, windows: Windows, arguments: tuple[Any, ...], num_heads: int, splits: int
) -> bool:
    """Launches the kernel for Hopper alone, if it takes the problem, and says so."""
    from fsa_core.kernels import hopper_interval_gradients
    from fsa_core.kernels.hopper_tiles import multiplies

    p = problem
    if not multiplies(p):
        return False
    tile = hopper_interval_gradients.tile_of(p)
    num_tiles = p.num_k_tokens // tile.keys + p.num_sequences
    hopper_interval_gradients.of_windows[(num_tiles * num_heads * splits,)](
        *arguments, **hopper_interval_gradients.constants(p, windows, tile), SPLITS=splits,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return True

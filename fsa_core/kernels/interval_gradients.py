"""Gradients of attention in which a query sees one run of windows: compressed and sliding-window attention.

With P = exp(scores - lse) computed again and delta = sum(out * grad_out) - grad_lse:

    grad_v = P^T grad_out        grad_scores = P * (grad_out v^T - delta)
    grad_k = grad_scores^T q * scale        grad_q = grad_scores k * scale

Two walks, seven matrix products: query tiles over the windows that they see, for grad_q, and tiles of windows
over the query tiles that see them, all heads of the group, for grad_k and grad_v. Sums stay in registers, and
delta is all that is written between. No mask is needed but at the ends of what a tile walks.

No atomics, and tiles are cut from where their own sequence, or what sees them of it, starts: the bits are the
same on every run, alone and in any company.
"""

import torch
import triton
import triton.language as tl

from fsa_core.kernels.block_share import add_share, row_shift
from fsa_core.kernels.delta import write_delta
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LOG2_E
from fsa_core.kernels.query_tiles import load_block, tile_tokens
from fsa_core.kernels.windows import Tile, Windows, first_position, last_tiles_first, visible_windows
from fsa_core.plan import padded_dim, search_steps
from fsa_core.problem import Problem


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
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr, num_sequences, search_steps, TOKENS
    )
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
    for step in tl.range(first_whole, end_whole, num_stages=STAGES):
        first_key = step * step_rows
        k = load_block(k_ptr + first_key * HEAD_DIM + k_offsets, True, dim_mask, False, mask_dims)
        v = load_block(v_ptr + first_key * VALUE_DIM + v_offsets, True, value_mask, False, mask_values)
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, True, scale, False)
    # Not with one stage, which ptxas 12.8 gets wrong where v is narrower than k.
    for i in tl.range(end_whole, end_step + (first_whole - first_step), num_stages=STAGES):
        step = i
        if REACH:
            step = tl.where(i < end_step, i, i - end_step + first_step)
        first_key = step * step_rows
        windows = step * KEYS + key
        exists = (windows < num_windows)[:, None]
        k = load_block(k_ptr + first_key * HEAD_DIM + k_offsets, exists, dim_mask, True, mask_dims)
        v = load_block(v_ptr + first_key * VALUE_DIM + v_offsets, exists, value_mask, True, mask_values)
        seen = windows[None, :] < visible[:, None]
        if REACH:
            seen &= windows[None, :] >= visible[:, None] - REACH
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, seen, scale, True)
    grad_q *= scale
    tl.store(grad_q_ptr + q_places, grad_q.to(grad_q_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)


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
    """grad_k and grad_v of KEYS windows; 0 of those that nobody sees."""
    # The first windows of all heads come first: most queries see them.
    tile, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    sequence, first, end = tile_tokens(tile, cu_seqlens_cmp_ptr, num_sequences, search_steps, KEYS)
    if first >= end:
        return
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_length = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    q_position = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence) - q_length
    first_window = first - tl.load(cu_seqlens_cmp_ptr + sequence)
    last_window = first_window + tl.minimum(KEYS, end - first) - 1
    # Tokens of the sequence: the first that sees anything here, those that see all, and the end.
    start = tl.maximum(first_position(first_window, KERNEL_SIZE, STRIDE) - q_position, 0)
    start_all = first_position(last_window, KERNEL_SIZE, STRIDE) - q_position
    end_all, stop = q_length, q_length
    if REACH:
        end_all = tl.minimum(first_position(first_window + REACH, KERNEL_SIZE, STRIDE) - q_position, q_length)
        stop = tl.minimum(first_position(last_window + REACH, KERNEL_SIZE, STRIDE) - q_position, q_length)
    num_steps = tl.cdiv(tl.maximum(stop - start, 0), TOKENS)
    first_whole = tl.minimum(tl.cdiv(tl.maximum(start_all - start, 0), TOKENS), num_steps)
    end_whole = tl.maximum(tl.maximum(end_all - start, 0) // TOKENS, first_whole)

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
    mask_rows: tl.constexpr = (TOKENS * HEADS != ROWS) | (PARTS * HEADS != GROUP_SIZE)
    mask_dims: tl.constexpr = HEAD_DIM != HEAD_DIM_PADDED
    mask_values: tl.constexpr = VALUE_DIM != VALUE_DIM_PADDED
    step_rows = tl.full((), TOKENS * NUM_Q_HEADS, tl.int64)
    grad_k = tl.zeros((KEYS, HEAD_DIM_PADDED), tl.float32)
    grad_v = tl.zeros((KEYS, VALUE_DIM_PADDED), tl.float32)
    # All parts of a group under one token tile, then the next.
    for i in tl.range(first_whole * PARTS, end_whole * PARTS, num_stages=STAGES):
        part_head = i % PARTS * HEADS
        row = first_row + i // PARTS * step_rows + part_head
        row_mask = (tile_token < TOKENS) & (part_head + tile_head < GROUP_SIZE)
        of_rows = row_mask[:, None]
        q = load_block(q_ptr + row * HEAD_DIM + q_offsets, of_rows, dim_mask, mask_rows, mask_dims)
        grad_out_ptrs = grad_out_ptr + row * VALUE_DIM + out_offsets
        grad_out = load_block(grad_out_ptrs, of_rows, value_mask, mask_rows, mask_values)
        lse = tl.load(lse_ptr + row + row_offsets, mask=row_mask, other=float("-inf"))
        delta = tl.load(delta_ptr + row + row_offsets, mask=row_mask, other=0.0)
        grad_k, grad_v = _add_rows(grad_k, grad_v, q, grad_out, k, v, lse, delta, True, scale, False)
    # Tokens at both ends, which do not see every window, or which do not exist.
    for i in tl.range(end_whole * PARTS, (num_steps + first_whole) * PARTS, num_stages=STAGES):
        step = tl.where(i // PARTS < num_steps, i // PARTS, i // PARTS - num_steps)
        part_head = i % PARTS * HEADS
        row = first_row + step * step_rows + part_head
        token = start + step * TOKENS + tile_token
        row_mask = (tile_token < TOKENS) & (part_head + tile_head < GROUP_SIZE) & (token < q_length)
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
    tl.store(grad_k_ptr + k_places, grad_k.to(grad_k_ptr.dtype.element_ty), mask=exists & dim_mask)
    tl.store(grad_v_ptr + v_places, grad_v.to(grad_v_ptr.dtype.element_ty), mask=exists & value_mask)


def interval_attention_backward(
    problem: Problem,
    windows: Windows,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, in their shapes and dtypes; tensors as in the forward pass, contiguous.

    k and v may be compressed or not, as ``windows`` says. out, grad_out [num_q_tokens, num_q_heads,
    value_dim] and lse, grad_lse float32 [num_q_tokens, num_q_heads].
    """
    p = problem
    delta = torch.empty_like(lse)
    write_delta(out, grad_out, grad_lse, delta)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    given = (q, k, v, grad_out, lse, delta)
    rest = (p.softmax_scale, p.num_sequences, search_steps(p.num_sequences))
    tile = _query_tile(p)
    num_tiles = p.num_q_tokens // tile.tokens + p.num_sequences
    _of_queries[num_tiles, p.num_kv_heads * tile.parts](
        *given, grad_q, *windows.starts, *rest, **_constants(p, windows, tile), num_warps=tile.num_warps
    )
    tile = _key_tile(p)
    num_tiles = p.num_k_tokens // tile.keys + p.num_sequences
    _of_keys[(num_tiles * p.num_kv_heads,)](
        *given, grad_k, grad_v, *windows.starts, *rest, **_constants(p, windows, tile),
        num_warps=tile.num_warps,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _constants(problem: Problem, windows: Windows, tile: Tile) -> dict[str, int]:
    p = problem
    return {
        "NUM_Q_HEADS": p.num_q_heads, "NUM_KV_HEADS": p.num_kv_heads, "GROUP_SIZE": p.group_size,
        "HEADS": tile.heads, "PARTS": tile.parts, "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim,
        "HEAD_DIM_PADDED": padded_dim(p.head_dim), "VALUE_DIM_PADDED": padded_dim(p.value_dim),
        "KERNEL_SIZE": windows.kernel_size, "STRIDE": windows.stride, "REACH": windows.reach,
        "TOKENS": tile.tokens, "ROWS": tile.rows, "KEYS": tile.keys, "STAGES": tile.num_stages,
    }  # fmt: skip


def _query_tile(problem: Problem) -> Tile:
    """128 rows, which read K and V half as often as 64, with 64 keys, or fewer where numbers are wide.

    307 instructions a warp and step at D = 128 in 16 bits (sm_90, Triton 3.7), 224 registers, no spills; 64
    rows and 64 keys in 4 warps take 348, with 128 keys they spill 368 bytes.
    """
    rows, keys = _by_width(problem, narrow=(128, 64), wide=(64, 32))
    return Tile.of(problem.group_size, rows=rows, keys=keys, num_warps=8, num_stages=2)


def _key_tile(problem: Problem) -> Tile:
    """64 rows and 128 keys, or fewer where numbers are wide.

    438 instructions a warp and step at D = 128 in 16 bits (sm_90, Triton 3.7), and 1 load of what is spilled;
    64 keys in 4 warps take 544, 50 of them for spills, or with 32 rows twice 274; 128 rows spill more.
    """
    rows, keys = _by_width(problem, narrow=(64, 128), wide=(32, 64))
    return Tile.of(problem.group_size, rows=rows, keys=keys, num_warps=8, num_stages=2)


def _by_width(problem: Problem, narrow: tuple[int, int], wide: tuple[int, int]) -> tuple[int, int]:
    """Rows and keys of a tile; float32, multiplied in three parts, takes shared memory for each part."""
    p = problem
    width = padded_dim(max(p.head_dim, p.value_dim))
    if p.dtype.itemsize == 4 and width > 64:
        return 32, 4096 // width
    return narrow if width * p.dtype.itemsize <= 256 else wide

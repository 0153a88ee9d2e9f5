"""Blocks that neighbouring tokens share: attended query tile by query tile, in registers, without partials.

A tile is a few consecutive tokens of one sequence with all query heads of their index head. Two launches:

1. ``agreement.agree``: list the blocks that enough of its tokens chose, each with a mask of those tokens;
2. attend: walk a tile's list with an online softmax, under the masks.

Tiles are cut from the start of each sequence and see only their own tokens, so an answer is bitwise the same
alone and in any company.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors
from fsa_core.kernels.primitives import LOG2_E, finite, natural_lse, reciprocal
from fsa_core.kernels.tile_order import tiles_to_walk
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.plan import ForwardPlan, Group
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, search_steps
from fsa_core.tiles import QueryTile

# What tiles leave may be nothing, and a program that finds no work item takes its time, too.
MIXED_PROGRAMS_PER_MULTIPROCESSOR = 8


def mixed_programs(device: torch.device) -> int:
    """How many programs take the work items of what a chunk's tiles leave in turn."""
    return MIXED_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)


@triton.jit
def load_shared(blocks_ptr, masks_ptr, step, tile_bit, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Of the list's part number ``step``, of KEYS keys: its first key, and which rows chose it."""
    parts: tl.constexpr = BLOCK_SIZE // KEYS
    first_key = (tl.load(blocks_ptr + step // parts) * BLOCK_SIZE + step % parts * KEYS).to(tl.int64)
    chose = ((tl.load(masks_ptr + step // parts) >> tile_bit) & 1) != 0
    return first_key, chose


@triton.jit
def load_block(ptrs, key_mask, dim_mask, MASK_KEYS: tl.constexpr, MASK_DIMS: tl.constexpr):
    """A K or V block; the masks, broadcastable to ``ptrs``, are applied only where they hide something."""
    if MASK_KEYS:
        return tl.load(ptrs, mask=key_mask & dim_mask, other=0.0)
    if MASK_DIMS:
        return tl.load(ptrs, mask=dim_mask, other=0.0)
    return tl.load(ptrs)


@triton.jit
def _add_block(row_max, row_sum, acc, scores, chose, v, scale, CUT: tl.constexpr):
    """Online softmax: one more block of keys, for the rows that chose it. CUT: some scores are -inf."""
    block_max = tl.max(scores, 1)
    new_max = tl.where(chose, tl.maximum(row_max, block_max), row_max)
    # A row that did not choose the block subtracts infinity: its weights are 0.
    shift = tl.where(chose, (finite(new_max) if CUT else new_max) * scale, float("inf"))
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2((row_max - finite(new_max)) * scale)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return new_max, row_sum, acc


@kernel
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
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
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    TILE_HEADS_PER_KV_HEAD: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    END_STAGES: tl.constexpr,
):
    """Attention of a tile's tokens over what they share: out [total_q, q heads, dim], lse natural."""
    group_head = tl.program_id(1)
    head = first_head + group_head
    index_head = group_head if INDEX_PER_HEAD else 0
    tile = first_tile + tl.program_id(0)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    if (first >= tl.minimum(q_end, first_token + num_tokens)) | (first + TOKENS <= first_token):
        return
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    q_shift = k_length - q_end

    rows = tl.arange(0, ROWS)
    tile_token = rows // HEADS_PER_PAIR
    tokens = first + tile_token
    row_mask = (tile_token < TOKENS) & (tokens < q_end)
    row_mask &= (tokens >= first_token) & (tokens < first_token + num_tokens)
    # The last key that a row may see.
    last_key = tl.minimum(tokens + q_shift, k_length - 1) if CAUSAL else tokens * 0 + k_length - 1
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    kv_head = head // TILE_HEADS_PER_KV_HEAD
    places = tokens.to(tl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR + rows % HEADS_PER_PAIR
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)

    tile_place = tl.cast(index_head, tl.int64) * num_tiles + tl.program_id(0)
    num_whole = tl.load(counts_ptr + tile_place * 2)
    num_shared = tl.load(counts_ptr + tile_place * 2 + 1)
    blocks_ptr += tile_place * MAX_SHARED
    masks_ptr += tile_place * MAX_SHARED
    tile_bit = tile_token.to(tl.int64)
    parts: tl.constexpr = BLOCK_SIZE // KEYS
    mask_dims: tl.constexpr = HEAD_DIM != HEAD_DIM_PADDED
    mask_values: tl.constexpr = VALUE_DIM != VALUE_DIM_PADDED
    # Where each number of a block lies from its first: the same for every block.
    key = tl.arange(0, KEYS)
    k_offsets = (key * NUM_KV_HEADS * HEAD_DIM)[None, :] + dims[:, None]
    v_offsets = (key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = k_start.to(tl.int64) * NUM_KV_HEADS + kv_head
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
    for step in tl.range(0, num_whole * parts, num_stages=STAGES):
        first_key, chose = load_shared(blocks_ptr, masks_ptr, step, tile_bit, BLOCK_SIZE, KEYS)
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, True, dim_mask[:, None], False, mask_dims)
        scores = tl.dot(q, k, input_precision="tf32x3")
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, True, value_mask[None, :], False, mask_values)
        row_max, row_sum, acc = _add_block(row_max, row_sum, acc, scores, chose, v, scale, False)
    # The blocks at the end of the list, which some tokens do not see whole, or which are short.
    for step in tl.range(num_whole * parts, num_shared * parts, num_stages=END_STAGES):
        first_key, chose = load_shared(blocks_ptr, masks_ptr, step, tile_bit, BLOCK_SIZE, KEYS)
        keys = first_key + key
        exists = keys < k_length
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, exists[None, :], dim_mask[:, None], True, mask_dims)
        scores = tl.dot(q, k, input_precision="tf32x3")
        scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, exists[:, None], value_mask[None, :], True, mask_values)
        row_max, row_sum, acc = _add_block(row_max, row_sum, acc, scores, chose, v, scale, True)
    acc *= reciprocal(row_sum)[:, None]
    tl.store(
        out_ptr + places[:, None] * VALUE_DIM + value_dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & value_mask[None, :],
    )
    tl.store(lse_ptr + places, natural_lse(row_max, row_sum, scale), mask=row_mask)


def attend_shared(
    agreement: Agreement,
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes out and lse of a group's tokens over the blocks they share, as ``agreement`` has them.

    Tensors as in ``selected_attention_forward``.
    """
    p, steps = problem, search_steps(problem.num_sequences)
    attend = _attending_on_hopper(p, plan, tile) if hopper.runs_on(q.device) else None
    tiles = tiles_to_walk(
        agreement, p, tile, group, cu_seqlens_q, cu_seqlens_k, are_resident=attend is not None
    )
    arguments = (
        q, k, v, out, lse, *tiles.lists, cu_seqlens_q, cu_seqlens_k, p.softmax_scale * LOG2_E.value,
        group.first_token, group.num_tokens, p.num_sequences, steps, tiles.first, tiles.of_head,
        group.first_head,
    )  # fmt: skip
    if attend is None:
        _attending(p, plan, tile)[tiles.number, group.num_heads](*arguments)
    else:
        programs = min(multiprocessors(q.device), tiles.number * group.num_heads)
        attend[(programs,)](*arguments, tiles.number, group.num_heads, int(tiles.is_ordered))


@lru_cache(maxsize=1024)
def _attending_on_hopper(problem: Problem, plan: ForwardPlan, tile: QueryTile) -> BoundKernel | None:
    """The kernel for Hopper alone, if it takes the tile."""
    from fsa_core.kernels import hopper_query_tiles
    from fsa_core.kernels.hopper_tiles import exact_dims

    if not hopper_query_tiles.takes(problem, tile):
        return None
    shared = exact_dims(attention_constants(problem, plan))
    return hopper_query_tiles.attend.bind(**shared, **hopper_query_tiles.tile_constants(tile), num_warps=4)


@lru_cache(maxsize=1024)
def _attending(problem: Problem, plan: ForwardPlan, tile: QueryTile) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    # ptxas 12.8 loses where v lies in shared memory if a loop has one place for it and v is narrower than k.
    is_as_wide = padded_dim(problem.value_dim) == padded_dim(problem.head_dim)
    end_stages = 1 if is_as_wide else tile.num_stages
    return _attend.bind(
        **attention_constants(problem, plan), TOKENS=tile.tokens, ROWS=tile.rows, KEYS=tile.keys,
        MAX_SHARED=tile.max_shared, STAGES=tile.num_stages, END_STAGES=end_stages, num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
    )  # fmt: skip

"""Blocks that a token does not share with its neighbours: attended token by token, in registers.

A token gives g rows, g the query heads that share its choice. From 8 or 16 heads on they fill the rows of the
least matrix product, and the partials of a pair, written and read, take as much as a block of keys: so a
program takes one token, begins with what its query tile has attended (``query_tiles``), walks the blocks that
are left, and writes the answer. Nothing is indexed and nothing merged.

A token's blocks are added in the order of its slots: an answer is bitwise the same alone and in any company.
"""

from functools import lru_cache

import torch
import triton.language as tl

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.kernels.primitives import LN_2, LOG2_E, find_sequence, finite, reciprocal
from fsa_core.plan import ForwardPlan, Group
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, power_of_two, search_steps
from fsa_core.tiles import MIN_ROWS

# K and V of a step, and how many steps are on their way: three programs share a multiprocessor of an H200.
STEP_BYTES = 32 * 1024
STAGES = 3


@kernel
def _attend_token(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    leftover_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    first_token,
    leftover_stride,
    num_slots,
    num_sequences,
    search_steps,
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
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds a token's leftover blocks to what out and lse hold; leaves tokens without any as they are."""
    head = first_head + tl.program_id(1)
    index_head = tl.program_id(1) if INDEX_PER_HEAD else 0
    slot = tl.arange(0, SLOTS)
    ids_ptr = leftover_ptr + tl.cast(index_head, tl.int64) * leftover_stride
    ids_ptr += tl.program_id(0).to(tl.int64) * num_slots
    ids = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    is_left = ids >= 0
    num_left = tl.sum(is_left.to(tl.int32), 0)
    if num_left == 0:
        return
    # Which of them comes first, second, ...
    order = tl.where(is_left, tl.cumsum(is_left.to(tl.int32), 0) - 1, -1)
    token = first_token + tl.program_id(0)
    sequence = find_sequence(cu_seqlens_q_ptr, token, num_sequences, search_steps)
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    num_visible = k_length
    if CAUSAL:
        num_visible = tl.minimum(token + k_length - tl.load(cu_seqlens_q_ptr + sequence + 1) + 1, k_length)

    row = tl.arange(0, ROWS)
    row_mask = row < HEADS_PER_PAIR
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    places = token.to(tl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR + row
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
    answer_ptrs = out_ptr + places[:, None] * VALUE_DIM + value_dims[None, :]
    mask = row_mask[:, None] & value_mask[None, :]
    row_max = tl.load(lse_ptr + places, mask=row_mask, other=float("-inf")) / LN_2
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    acc = tl.load(answer_ptrs, mask=mask, other=0.0).to(tl.float32)

    # Where each number of a step lies from its first: the same for every step.
    key = tl.arange(0, KEYS)
    k_offsets = (key * (NUM_KV_HEADS * HEAD_DIM))[None, :] + dims[:, None]
    v_offsets = (key * (NUM_KV_HEADS * VALUE_DIM))[:, None] + value_dims[None, :]
    first_row = k_start.to(tl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    parts: tl.constexpr = BLOCK_SIZE // KEYS
    for step in tl.range(0, num_left * parts, num_stages=STAGES):
        block = tl.sum(tl.where(order == step // parts, ids, 0), 0)
        first_key = block * BLOCK_SIZE + step % parts * KEYS
        seen = key < num_visible - first_key
        k_ptrs = k_ptr + first_key.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM) + k_offsets
        k = tl.load(k_ptrs, mask=seen[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = finite(new_max)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v_ptrs = v_ptr + first_key.to(tl.int64) * (NUM_KV_HEADS * VALUE_DIM) + v_offsets
        v = tl.load(v_ptrs, mask=seen[:, None] & value_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        row_max = new_max
    acc *= reciprocal(row_sum)[:, None]
    tl.store(answer_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + places, (row_max + tl.log2(row_sum)) * LN_2, mask=row_mask)


def attend_tokens(
    agreement: Agreement,
    problem: Problem,
    plan: ForwardPlan,
    group: Group,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Adds to out and lse of a group's tokens what their query tiles left, as ``agreement`` has it.

    Tensors as in ``selected_attention_forward``.
    """
    p = problem
    _attending(p, plan)[group.num_tokens, group.num_heads](
        q, k, v, out, lse, agreement.leftover, cu_seqlens_q, cu_seqlens_k, p.softmax_scale * LOG2_E.value,
        group.first_token, agreement.leftover.stride(0), p.num_slots, p.num_sequences,
        search_steps(p.num_sequences), group.first_head,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _attending(problem: Problem, plan: ForwardPlan) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    p = problem
    key_bytes = (padded_dim(p.head_dim) + padded_dim(p.value_dim)) * p.dtype.itemsize
    step_keys = 1 << (STEP_BYTES // key_bytes).bit_length() - 1
    return _attend_token.bind(
        **attention_constants(p, plan), SLOTS=power_of_two(p.num_slots),
        ROWS=max(MIN_ROWS, power_of_two(plan.heads_per_pair)), KEYS=min(p.block_size, 64, max(step_keys, 16)),
        STAGES=STAGES, num_warps=4 if padded_dim(p.value_dim) <= 128 else 8,
    )  # fmt: skip

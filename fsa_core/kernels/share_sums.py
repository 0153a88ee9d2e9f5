"""The gradient of q from the shares of its pairs, which are added in the order of a token's slots."""

from functools import lru_cache

import torch
import triton.language as tl

from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.plan import Chunk
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim

# As measured for the forward pass's merge, which reads partials in the same way.
SUM_ROWS = 8
SUM_WARPS = 1


@kernel
def _sum_shares(
    shares_ptr,
    used_ptr,
    item_offsets_ptr,
    grad_q_ptr,
    first_token,
    num_tokens,
    chunk_tokens,
    num_slots,
    num_segments,
    num_chunks,
    group_pairs,
    first_head,
    first_index_head,
    chunk,
    NUM_Q_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    WITH_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the shares of ROWS (token, query head) rows of grad_q [total_q, q heads, dim], slot by slot.

    used [index heads, tokens, slots], of any integers, is negative for a slot that has none. WITH_SHARED adds
    to what grad_q holds, and leaves rows without shares, and chunks without work items, as they are.
    """
    chunk_head = tl.program_id(1)
    index_head = first_index_head + chunk_head if INDEX_PER_HEAD else 0
    if WITH_SHARED:
        row = index_head * num_chunks + chunk
        if tl.load(item_offsets_ptr + row * (num_segments + 1) + num_segments) == 0:
            return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = rows // HEADS_PER_PAIR
    row_mask = tokens < num_tokens
    heads = rows % HEADS_PER_PAIR
    dims = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    used_ptrs = (
        used_ptr + tl.cast(index_head, tl.int64) * group_pairs + (chunk * chunk_tokens + tokens) * num_slots
    )
    first_pair = (chunk_head.to(tl.int64) * num_tokens + tokens) * num_slots
    share_ptrs = shares_ptr + (first_pair * HEADS_PER_PAIR + heads)[:, None] * HEAD_DIM + dims[None, :]
    slot_stride: tl.constexpr = HEADS_PER_PAIR * HEAD_DIM
    q_heads = (first_head + chunk_head) * HEADS_PER_PAIR + heads
    places = (first_token + tokens).to(tl.int64) * NUM_Q_HEADS + q_heads
    grad_q_ptrs = grad_q_ptr + places[:, None] * HEAD_DIM + dims[None, :]
    acc = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    bits = tl.arange(0, 32)
    if WITH_SHARED:
        any_used = tl.zeros((ROWS,), tl.int32)
        for first_slot in range(0, num_slots, 32):
            exists = row_mask[:, None] & (first_slot + bits < num_slots)[None, :]
            marks = tl.load(used_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
            any_used |= tl.max((marks >= 0).to(tl.int32), 1)
        if tl.max(any_used, 0) == 0:
            return
        row_mask &= any_used != 0
        acc = tl.load(grad_q_ptrs, mask=row_mask[:, None] & dim_mask, other=0.0).to(tl.float32)
    for first_slot in range(0, num_slots, 32):
        exists = row_mask[:, None] & (first_slot + bits < num_slots)[None, :]
        marks = tl.load(used_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
        used = tl.sum((marks >= 0).to(tl.int32) << bits[None, :], 1)
        # Two slots at a time: what limits this kernel is how many loads are under way.
        for step in range(0, tl.minimum(num_slots - first_slot, 32), 2):
            slot_ptrs = share_ptrs + (first_slot + step) * slot_stride
            has_a = ((used >> step) & 1) != 0
            has_b = ((used >> (step + 1)) & 1) != 0
            share_a = tl.load(slot_ptrs, mask=has_a[:, None] & dim_mask, other=0.0)
            share_b = tl.load(slot_ptrs + slot_stride, mask=has_b[:, None] & dim_mask, other=0.0)
            acc += share_a.to(tl.float32)
            acc += share_b.to(tl.float32)
    tl.store(grad_q_ptrs, acc.to(grad_q_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)


def sum_shares(
    problem: Problem,
    chunk: Chunk,
    shares: torch.Tensor,
    used: torch.Tensor,
    item_offsets: torch.Tensor,
    grad_q: torch.Tensor,
    *,
    chunk_tokens: int,
    group_pairs: int,
    num_chunks: int,
    with_shared: bool,
) -> None:
    """Writes grad_q of a chunk, or adds to it; tensors as ``_sum_shares`` has them."""
    p, c = problem, chunk
    _sum_kernel(p, with_shared, SUM_ROWS)[-(-c.num_tokens * p.heads_per_pair // SUM_ROWS), c.num_heads](
        shares, used, item_offsets, grad_q, c.first_token, c.num_tokens, chunk_tokens, p.num_slots,
        item_offsets.shape[1] - 1, num_chunks, group_pairs, c.first_head, c.first_index_head, c.number,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _sum_kernel(problem: Problem, with_shared: bool, rows: int) -> BoundKernel:
    p = problem
    return _sum_shares.bind(
        NUM_Q_HEADS=p.num_q_heads, HEADS_PER_PAIR=p.heads_per_pair, INDEX_PER_HEAD=p.index_heads > 1,
        HEAD_DIM=p.head_dim, HEAD_DIM_PADDED=padded_dim(p.head_dim), WITH_SHARED=with_shared, ROWS=rows,
        num_warps=SUM_WARPS, num_stages=1,
    )  # fmt: skip

"""The gradient of q pair by pair: KV blocks outside, the query tokens that chose them inside.

A work item of the index loads its K/V block once and writes each pair's share of the gradient at the pair's
own (token, slot); share_sums adds the shares of a token.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels.block_share import Operands, add_share, row_shift
from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.index import SLOT_BITS, SLOT_MASK, Inversion, load_item
from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors
from fsa_core.kernels.primitives import find_block
from fsa_core.kernels.query_tiles import mixed_programs
from fsa_core.kernels.share_sums import sum_shares
from fsa_core.plan import ForwardPlan, Group, chunks
from fsa_core.problem import Problem
from fsa_core.sizes import search_steps

PAIR_STAGES = 1
# Of a block that the kernel for Hopper alone takes: with more, a thread has more numbers than registers.
MOST_KEYS = 64


@triton.jit
def _share_item(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    shares_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    segment,
    item,
    scale,
    first_token,
    num_tokens,
    num_slots,
    num_sequences,
    search_steps,
    head,
    chunk_head,
    first_delta_head,
    num_delta_heads,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    TILE_HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES_PER_ITEM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The rows of up to TILES_PER_ITEM tiles under one KV block; what it writes as ``_of_pairs`` says."""
    block_start, k_start, k_length, q_shift = find_block(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE
    )
    # A tile is whole pairs, so that what a row is of its pair is the same in every tile.
    pairs_in_tile: tl.constexpr = ROWS // HEADS_PER_PAIR
    pairs_ptr, num_pairs = load_item(
        pairs_ptr, offsets_ptr, item_offsets_ptr, segment, item, pairs_in_tile * TILES_PER_ITEM
    )

    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    value_mask = (value_dims < VALUE_DIM)[None, :]
    keys = block_start + tl.arange(0, KEYS)
    key_rows = (k_start + keys).to(tl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    k_ptrs = k_ptr + key_rows[:, None] * HEAD_DIM + dims[None, :]
    v_ptrs = v_ptr + key_rows[:, None] * VALUE_DIM + value_dims[None, :]
    exists = (keys < k_length)[:, None]
    k = tl.load(k_ptrs, mask=exists & dim_mask, other=0.0)
    v = tl.load(v_ptrs, mask=exists & value_mask, other=0.0)

    # Offsets count from the chunk's first token and fit 32 bits.
    pair_in_tile = tl.arange(0, ROWS) // HEADS_PER_PAIR
    head_in_pair = tl.arange(0, ROWS) % HEADS_PER_PAIR
    first_q_row = tl.cast(first_token, tl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR
    q_ptr += first_q_row * HEAD_DIM
    grad_out_ptr += first_q_row * VALUE_DIM
    lse_ptr += first_q_row
    delta_ptr += tl.cast(first_token, tl.int64) * num_delta_heads + (head * HEADS_PER_PAIR - first_delta_head)
    q_offsets = (head_in_pair * HEAD_DIM)[:, None] + dims[None, :]
    out_offsets = (head_in_pair * VALUE_DIM)[:, None] + value_dims[None, :]
    num_tiles = tl.minimum(TILES_PER_ITEM, tl.cdiv(num_pairs, pairs_in_tile))
    for tile in tl.range(0, num_tiles, num_stages=STAGES):
        pair_number = tile * pairs_in_tile + pair_in_tile
        row_mask = (pair_in_tile < pairs_in_tile) & (pair_number < num_pairs)
        pairs = tl.load(pairs_ptr + pair_number, mask=row_mask, other=0)
        chunk_token = pairs >> SLOT_BITS
        q_mask = row_mask[:, None] & dim_mask
        q_ptrs = q_ptr + ((chunk_token * (NUM_Q_HEADS * HEAD_DIM))[:, None] + q_offsets)
        q = tl.load(q_ptrs, mask=q_mask, other=0.0)
        grad_out_ptrs = grad_out_ptr + ((chunk_token * (NUM_Q_HEADS * VALUE_DIM))[:, None] + out_offsets)
        grad_out = tl.load(grad_out_ptrs, mask=row_mask[:, None] & value_mask, other=0.0)
        lse = tl.load(lse_ptr + chunk_token * NUM_Q_HEADS + head_in_pair, mask=row_mask, other=float("-inf"))
        delta = tl.load(delta_ptr + chunk_token * num_delta_heads + head_in_pair, mask=row_mask, other=0.0)
        shift = row_shift(lse)
        positions = chunk_token + (first_token + q_shift)
        last_key = positions if CAUSAL else positions * 0 + k_length - 1
        grad_q = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
        visible = keys[None, :] <= last_key[:, None]
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, visible, scale, True)
        for start in tl.static_range(KEYS, BLOCK_SIZE, KEYS):
            exists = (keys + start < k_length)[:, None]
            k_more_ptrs = k_ptrs + start * NUM_KV_HEADS * HEAD_DIM
            k_more = tl.load(k_more_ptrs, mask=exists & dim_mask, other=0.0)
            v_more_ptrs = v_ptrs + start * NUM_KV_HEADS * VALUE_DIM
            v_more = tl.load(v_more_ptrs, mask=exists & value_mask, other=0.0)
            visible = (keys + start)[None, :] <= last_key[:, None]
            grad_q = add_share(grad_q, q, grad_out, k_more, v_more, shift, delta, visible, scale, True)
        place = ((chunk_head * num_tokens + chunk_token) * num_slots + (pairs & SLOT_MASK)) * HEADS_PER_PAIR
        share_ptrs = shares_ptr + ((place * HEAD_DIM)[:, None] + q_offsets)
        # Scaled here: a share that was not might overflow float16.
        grad_q *= scale
        tl.store(share_ptrs, grad_q.to(shares_ptr.dtype.element_ty), mask=q_mask)


@kernel
def _of_pairs(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    shares_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    item_segment_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    first_token,
    num_tokens,
    chunk_tokens,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    group_pairs,
    max_items,
    first_head,
    first_index_head,
    chunk,
    first_delta_head,
    num_delta_heads,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES_PER_ITEM: tl.constexpr,
    STAGES: tl.constexpr,
    ITEM_A_PROGRAM: tl.constexpr,
):
    """The work items of a chunk: a program has one, or every so many-th of them.

    Writes shares [heads, tokens, slots, HEADS_PER_PAIR, HEAD_DIM] at the rows' own (token, slot).
    """
    chunk_head = tl.program_id(1)
    head = first_head + chunk_head
    index_head = first_index_head + chunk_head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + chunk
    offsets_ptr += row * (num_segments + 1)
    item_offsets_ptr += row * (num_segments + 1)
    item_segment_ptr += tl.cast(row, tl.int64) * max_items
    pairs_ptr += tl.cast(index_head, tl.int64) * group_pairs + chunk * chunk_tokens * num_slots
    num_items = tl.load(item_offsets_ptr + num_segments)
    if ITEM_A_PROGRAM:
        item = tl.program_id(0)
        if item < num_items:
            _share_item(
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, shares_ptr, pairs_ptr, offsets_ptr,
                item_offsets_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tl.load(item_segment_ptr + item), item,
                scale, first_token, num_tokens, num_slots, num_sequences, search_steps, head, chunk_head,
                first_delta_head, num_delta_heads, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR,
                TILE_HEADS_PER_KV_HEAD, HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_SIZE,
                CAUSAL, ROWS, KEYS, TILES_PER_ITEM, STAGES,
            )  # fmt: skip
    else:
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            _share_item(
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, shares_ptr, pairs_ptr, offsets_ptr,
                item_offsets_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tl.load(item_segment_ptr + item), item,
                scale, first_token, num_tokens, num_slots, num_sequences, search_steps, head, chunk_head,
                first_delta_head, num_delta_heads, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR,
                TILE_HEADS_PER_KV_HEAD, HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_SIZE,
                CAUSAL, ROWS, KEYS, TILES_PER_ITEM, STAGES,
            )  # fmt: skip


def gradients_of_pairs(
    problem: Problem,
    plan: ForwardPlan,
    group: Group,
    inversion: Inversion,
    used: torch.Tensor,
    shares: torch.Tensor,
    given: Operands,
    grad_q: torch.Tensor,
) -> None:
    """Writes grad_q over a group's indexed pairs, a chunk at a time; with query tiles, adds it to theirs.

    ``used`` as ``_sum_shares`` has it.
    """
    p, is_mixed = problem, plan.query_tile is not None
    of_pairs, steps = _pair_kernel(p, plan, PAIR_STAGES), search_steps(p.num_sequences)
    group_pairs = inversion.pairs.shape[1]
    if plan.is_buffered:
        _pairs_on_hopper(p, plan)[(min(multiprocessors(given.q.device), plan.max_items),)](
            *given.tensors, shares, inversion.counts, inversion.used, inversion.pairs,
            inversion.item_offsets, inversion.items, grad_q, p.softmax_scale, group.first_token,
            group.num_tokens, plan.chunk_tokens, group.first_head, group.num_heads, plan.chunk_heads,
            p.num_slots, plan.segments, plan.group_chunks, plan.group_tokens, plan.max_items,
            given.first_delta_head, given.delta.shape[1],
        )  # fmt: skip
        return
    programs = min(plan.max_items, mixed_programs(given.q.device)) if is_mixed else plan.max_items
    for c in chunks(plan, group):
        of_pairs[programs, c.num_heads](
            *given.tensors, shares, inversion.pairs, inversion.offsets, inversion.item_offsets,
            inversion.items, given.cu_seqlens_q, given.cu_seqlens_k, p.softmax_scale, c.first_token,
            c.num_tokens, plan.chunk_tokens, p.num_slots, p.num_sequences, steps, plan.segments,
            plan.group_chunks, group_pairs, plan.max_items, c.first_head, c.first_index_head, c.number,
            given.first_delta_head, given.delta.shape[1],
        )  # fmt: skip
        sum_shares(
            p, c, shares, used, inversion.item_offsets, grad_q, chunk_tokens=plan.chunk_tokens,
            group_pairs=group_pairs, num_chunks=plan.group_chunks, with_shared=is_mixed,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _pair_kernel(problem: Problem, plan: ForwardPlan, stages: int) -> BoundKernel:
    tile = plan.tile
    return _of_pairs.bind(
        **attention_constants(problem, plan), ROWS=tile.rows, KEYS=tile.keys,
        TILES_PER_ITEM=tile.tiles_per_item, STAGES=stages, ITEM_A_PROGRAM=plan.query_tile is None,
        num_warps=tile.num_warps, num_stages=1, maxnreg=tile.max_registers,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _pairs_on_hopper(problem: Problem, plan: ForwardPlan) -> BoundKernel:
    """The kernel for Hopper alone."""
    from fsa_core.kernels import hopper_pair_query_gradients
    from fsa_core.kernels.hopper_tiles import exact_dims

    shared = exact_dims(attention_constants(problem, plan))
    return hopper_pair_query_gradients.of_pairs.bind(
        **shared,
        **hopper_pair_query_gradients.constants(plan.tile, problem.num_slots),
        WITH_SHARED=plan.query_tile is not None,
    )

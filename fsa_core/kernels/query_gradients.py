"""The gradient of q, where those of keys are made apart: with the blocks that neighbours share, tile by tile.

With P = exp(scores - lse) made again from q, k and lse, and delta = sum(out * grad_out) - grad_lse:

    grad_q = (P * (grad_out v^T - delta)) k * scale

Stages, as the path of the plan says and as the forward pass has them:

1. of tiles: a query tile walks the blocks that its tokens share (query_tiles.agree) under their masks, its
   gradients in registers, and writes them once;
2. of pairs: for what is left, a work item loads its K/V block once and writes each pair's share of the
   gradient at the pair's own (token, slot);
3. sum: the shares of a token are added in the order of its slots, to what its tile gave.

No atomics, and a row's numbers depend on nothing but the row and its tile: the bits are the same on every run
and in any company.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels.index import SLOT_BITS, SLOT_MASK, Inversion, invert, new_inversion
from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.kernels.primitives import LOG2_E, find_segment_sequence, first_segment
from fsa_core.kernels.query_tiles import (
    Agreement,
    agree,
    load_block,
    mixed_programs,
    new_agreement,
    tile_tokens,
    tiles_of,
)
from fsa_core.plan import (
    Chunk,
    ForwardPlan,
    Group,
    QueryTile,
    chunks,
    groups,
    padded_dim,
    search_steps,
)
from fsa_core.problem import Problem

# As measured for the forward pass's merge, which reads partials in the same way.
SUM_ROWS = 8
SUM_WARPS = 1
PAIR_STAGES = 1


@dataclass(frozen=True, slots=True)
class Operands:
    """What gradients are made from; every tensor contiguous.

    q [total_q, q heads, head_dim], k [total_k, KV heads, head_dim], v [total_k, KV heads, value_dim],
    grad_out [total_q, q heads, value_dim], lse float32 [total_q, q heads]. delta float32 [total_q, heads], of
    query heads from ``first_delta_head`` on.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    first_delta_head: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.grad_out, self.lse, self.delta


@triton.jit
def _row_shift(lse):
    """What a row subtracts from its scores, in log2 units; infinity, for weights of 0, if it sees no key."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def _add_block(grad_q, q, grad_out, k, v, shift, delta, visible, scale, CUT: tl.constexpr):
    """Adds a block's share, not scaled, to grad_q. CUT: ``visible`` hides some keys."""
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    weights = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    if CUT:
        weights = tl.where(visible, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="tf32x3")
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="tf32x3")


@kernel
def _of_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_q [total_q, q heads, dim] of a tile's tokens over what they share; 0 where they share nothing."""
    group_head = tl.program_id(1)
    head = first_head + group_head
    index_head = group_head if INDEX_PER_HEAD else 0
    tile = first_tile + tl.program_id(0)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    if (first >= tl.minimum(q_end, first_token + num_tokens)) | (first + TOKENS <= first_token):
        return
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start

    rows = tl.arange(0, ROWS)
    tile_token = rows // HEADS_PER_PAIR
    tokens = first + tile_token
    row_mask = (tile_token < TOKENS) & (tokens < q_end)
    row_mask &= (tokens >= first_token) & (tokens < first_token + num_tokens)
    # The last key that a row may see; keys past the end of the sequence come after every token.
    last_key = tokens + (k_length - q_end) if CAUSAL else tokens * 0 + k_length - 1
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    value_mask = (value_dims < VALUE_DIM)[None, :]
    q_heads = head * HEADS_PER_PAIR + rows % HEADS_PER_PAIR
    places = tokens.to(tl.int64) * NUM_Q_HEADS + q_heads
    q_places = places[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_places, mask=row_mask[:, None] & dim_mask, other=0.0)
    out_places = places[:, None] * VALUE_DIM + value_dims[None, :]
    grad_out = tl.load(grad_out_ptr + out_places, mask=row_mask[:, None] & value_mask, other=0.0)
    row_shift = _row_shift(tl.load(lse_ptr + places, mask=row_mask, other=float("-inf")))
    delta_places = tokens.to(tl.int64) * num_delta_heads + (q_heads - first_delta_head)
    delta = tl.load(delta_ptr + delta_places, mask=row_mask, other=0.0)

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
    k_offsets = (key * NUM_KV_HEADS * HEAD_DIM)[:, None] + dims[None, :]
    v_offsets = (key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = k_start.to(tl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    grad_q = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    for step in tl.range(0, num_whole * parts, num_stages=STAGES):
        first_key = (tl.load(blocks_ptr + step // parts) * BLOCK_SIZE + step % parts * KEYS).to(tl.int64)
        chose = ((tl.load(masks_ptr + step // parts) >> tile_bit) & 1) != 0
        shift = tl.where(chose, row_shift, float("inf"))
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, True, dim_mask, False, mask_dims)
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, True, value_mask, False, mask_values)
        grad_q = _add_block(grad_q, q, grad_out, k, v, shift, delta, True, scale, False)
    # The blocks at the end of the list, which some tokens do not see whole, or which are short.
    for step in tl.range(num_whole * parts, num_shared * parts, num_stages=1):
        first_key = (tl.load(blocks_ptr + step // parts) * BLOCK_SIZE + step % parts * KEYS).to(tl.int64)
        chose = ((tl.load(masks_ptr + step // parts) >> tile_bit) & 1) != 0
        shift = tl.where(chose, row_shift, float("inf"))
        keys = first_key + key
        exists = (keys < k_length)[:, None]
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, exists, dim_mask, True, mask_dims)
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, exists, value_mask, True, mask_values)
        visible = keys[None, :] <= last_key[:, None]
        grad_q = _add_block(grad_q, q, grad_out, k, v, shift, delta, visible, scale, True)
    grad_q *= scale
    tl.store(grad_q_ptr + q_places, grad_q.to(grad_q_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)


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
    sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
    block_start = (segment - first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE)) * BLOCK_SIZE
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    q_shift = k_length - tl.load(cu_seqlens_q_ptr + sequence + 1)
    # A tile is whole pairs, so that what a row is of its pair is the same in every tile.
    pairs_in_tile: tl.constexpr = ROWS // HEADS_PER_PAIR
    first_pair = (item - tl.load(item_offsets_ptr + segment)) * pairs_in_tile * TILES_PER_ITEM
    segment_start = tl.load(offsets_ptr + segment)
    num_pairs = tl.load(offsets_ptr + segment + 1) - segment_start - first_pair
    pairs_ptr += segment_start + first_pair

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
        shift = _row_shift(lse)
        positions = chunk_token + (first_token + q_shift)
        last_key = positions if CAUSAL else positions * 0 + k_length - 1
        grad_q = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
        visible = keys[None, :] <= last_key[:, None]
        grad_q = _add_block(grad_q, q, grad_out, k, v, shift, delta, visible, scale, True)
        for start in tl.static_range(KEYS, BLOCK_SIZE, KEYS):
            exists = (keys + start < k_length)[:, None]
            k_more_ptrs = k_ptrs + start * NUM_KV_HEADS * HEAD_DIM
            k_more = tl.load(k_more_ptrs, mask=exists & dim_mask, other=0.0)
            v_more_ptrs = v_ptrs + start * NUM_KV_HEADS * VALUE_DIM
            v_more = tl.load(v_more_ptrs, mask=exists & value_mask, other=0.0)
            visible = (keys + start)[None, :] <= last_key[:, None]
            grad_q = _add_block(grad_q, q, grad_out, k_more, v_more, shift, delta, visible, scale, True)
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


@kernel
def _sum_shares(
    shares_ptr,
    ranks_ptr,
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

    A slot whose rank is negative has none. WITH_SHARED adds to what grad_q holds, and leaves rows without
    shares, and chunks without work items, as they are.
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
    rank_ptrs = (
        ranks_ptr + tl.cast(index_head, tl.int64) * group_pairs + (chunk * chunk_tokens + tokens) * num_slots
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
            ranks = tl.load(rank_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
            any_used |= tl.max((ranks >= 0).to(tl.int32), 1)
        if tl.max(any_used, 0) == 0:
            return
        row_mask &= any_used != 0
        acc = tl.load(grad_q_ptrs, mask=row_mask[:, None] & dim_mask, other=0.0).to(tl.float32)
    for first_slot in range(0, num_slots, 32):
        exists = row_mask[:, None] & (first_slot + bits < num_slots)[None, :]
        ranks = tl.load(rank_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
        used = tl.sum((ranks >= 0).to(tl.int32) << bits[None, :], 1)
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


def query_gradients(
    problem: Problem,
    plan: ForwardPlan,
    heads: range,
    given: Operands,
    block_indices: torch.Tensor,
    grad_q: torch.Tensor,
) -> None:
    """Writes grad_q [total_q, q heads, head_dim] of some tile heads, whose delta is in ``given``.

    block_indices int32 [index_heads, total_q, slots]. The plan is that of a forward pass whose values are at
    least as wide as keys: its partials are the shares.
    """
    p, tile = problem, plan.query_tile
    agreement = None if tile is None else new_agreement(p, plan, tile, given.q)
    inversion = new_inversion(plan, p.num_slots, given.q) if plan.has_partials else None
    num_shares = plan.chunk_heads * plan.chunk_tokens * p.num_slots * plan.heads_per_pair
    shares = given.q.new_empty(num_shares * plan.has_partials, p.head_dim)
    for group in _groups_of(p, plan, heads):
        ids, first_index_head, first_row_token = block_indices, group.first_index_head, 0
        if tile is not None and agreement is not None:
            agree(agreement, p, plan, tile, group, block_indices, given.cu_seqlens_q, given.cu_seqlens_k)
            _take_shared(p, plan, tile, group, agreement, given, grad_q)
            ids, first_index_head, first_row_token = agreement.leftover, 0, group.first_token
        if inversion is not None:
            invert(
                inversion, ids, given.cu_seqlens_q, given.cu_seqlens_k, first_token=group.first_token,
                num_tokens=group.num_tokens, first_head=first_index_head, num_heads=group.num_index_heads,
                chunk_tokens=plan.chunk_tokens, block_size=p.block_size,
                pairs_per_item=plan.tile.pairs_per_item, first_row_token=first_row_token,
            )  # fmt: skip
            _take_pairs(p, plan, group, inversion, shares, given, grad_q)


def _groups_of(problem: Problem, plan: ForwardPlan, heads: range) -> Iterator[Group]:
    """What the plan's groups have of some tile heads."""
    for group in groups(problem, plan):
        first = max(group.first_head, heads.start)
        num_heads = min(group.first_head + group.num_heads, heads.stop) - first
        if num_heads > 0:
            index = (first, num_heads) if plan.index_per_head else (0, 1)
            yield replace(
                group,
                first_head=first,
                num_heads=num_heads,
                first_index_head=index[0],
                num_index_heads=index[1],
            )


def _take_shared(
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    agreement: Agreement,
    given: Operands,
    grad_q: torch.Tensor,
) -> None:
    p = problem
    first_tile, num_tiles = tiles_of(p, tile, group)
    _of_tiles[num_tiles, group.num_heads](
        *given.tensors, grad_q, agreement.blocks, agreement.masks, agreement.counts, given.cu_seqlens_q,
        given.cu_seqlens_k, p.softmax_scale, group.first_token, group.num_tokens,
        p.num_sequences, search_steps(p.num_sequences), first_tile, agreement.counts.shape[1],
        group.first_head, given.first_delta_head, given.delta.shape[1], **_shapes(p, plan),
        TOKENS=tile.tokens, ROWS=tile.rows, KEYS=tile.keys, MAX_SHARED=tile.max_shared,
        STAGES=tile.num_stages, num_warps=tile.num_warps, maxnreg=tile.max_registers,
    )  # fmt: skip


def _take_pairs(
    problem: Problem,
    plan: ForwardPlan,
    group: Group,
    inversion: Inversion,
    shares: torch.Tensor,
    given: Operands,
    grad_q: torch.Tensor,
) -> None:
    """Shares of the indexed pairs, and their sums, a chunk at a time."""
    p, is_mixed = problem, plan.query_tile is not None
    of_pairs, steps = _pair_kernel(p, plan, PAIR_STAGES), search_steps(p.num_sequences)
    programs = min(plan.max_items, mixed_programs(given.q.device)) if is_mixed else plan.max_items
    group_pairs = inversion.pairs.shape[1]
    for c in chunks(plan, group):
        of_pairs[programs, c.num_heads](
            *given.tensors, shares, inversion.pairs, inversion.offsets, inversion.item_offsets,
            inversion.item_segment, given.cu_seqlens_q, given.cu_seqlens_k, p.softmax_scale, c.first_token,
            c.num_tokens, plan.chunk_tokens, p.num_slots, p.num_sequences, steps, plan.segments,
            plan.group_chunks, group_pairs, plan.max_items, c.first_head, c.first_index_head, c.number,
            given.first_delta_head, given.delta.shape[1],
        )  # fmt: skip
        sum_shares(
            p, c, shares, inversion.ranks, inversion.item_offsets, grad_q, chunk_tokens=plan.chunk_tokens,
            group_pairs=group_pairs, num_chunks=plan.group_chunks, with_shared=is_mixed,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _pair_kernel(problem: Problem, plan: ForwardPlan, stages: int) -> BoundKernel:
    tile = plan.tile
    return _of_pairs.bind(
        **_shapes(problem, plan), ROWS=tile.rows, KEYS=tile.keys, TILES_PER_ITEM=tile.tiles_per_item,
        STAGES=stages, ITEM_A_PROGRAM=plan.query_tile is None, num_warps=tile.num_warps, num_stages=1,
        maxnreg=tile.max_registers,
    )  # fmt: skip


def sum_shares(
    problem: Problem,
    chunk: Chunk,
    shares: torch.Tensor,
    ranks: torch.Tensor,
    item_offsets: torch.Tensor,
    grad_q: torch.Tensor,
    *,
    chunk_tokens: int,
    group_pairs: int,
    num_chunks: int,
    with_shared: bool,
) -> None:
    """Writes grad_q of a chunk, or adds to it; tensors as ``_sum_shares`` has them, ranks of any integers."""
    p, c = problem, chunk
    _sum_kernel(p, with_shared, SUM_ROWS)[-(-c.num_tokens * p.heads_per_pair // SUM_ROWS), c.num_heads](
        shares, ranks, item_offsets, grad_q, c.first_token, c.num_tokens, chunk_tokens, p.num_slots,
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


def _shapes(problem: Problem, plan: ForwardPlan) -> dict[str, int]:
    p = problem
    return {
        "NUM_Q_HEADS": p.num_q_heads, "NUM_KV_HEADS": p.num_kv_heads, "HEADS_PER_PAIR": plan.heads_per_pair,
        "TILE_HEADS_PER_KV_HEAD": plan.tile_heads_per_kv_head, "INDEX_PER_HEAD": plan.index_per_head,
        "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim, "HEAD_DIM_PADDED": padded_dim(p.head_dim),
        "VALUE_DIM_PADDED": padded_dim(p.value_dim), "BLOCK_SIZE": p.block_size, "CAUSAL": p.causal,
    }  # fmt: skip

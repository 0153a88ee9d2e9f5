"""Gradients of selected attention: KV blocks outside, the query tokens that chose them inside.

Flash Sparse Attention, arXiv 2508.18224. With P = exp(scores - lse) recomputed tile by tile and
delta = sum(out * grad_out) - grad_lse:

    grad_v = P^T grad_out        grad_scores = P * (grad_out v^T - delta)
    grad_k = grad_scores^T q * scale        grad_q = grad_scores k * scale

Stages, no host synchronisation: delta; an index in a fixed order (sorted_index); a work item loads its K/V
block once, walks its rows (pairs x query heads), keeps the block's gradients in registers and writes each
pair's share of grad_q; the items of one block are added in their order, and so are the slots of one token.
No atomics: the bits are the same on every run. The gradients of q do not depend on what else is packed into
the call; those of k and v add the same terms, grouped by chunks of the packed tokens.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from fsa_core.backward_plan import BackwardPlan, Pass, plan_backward
from fsa_core.kernels.index import SLOT_BITS, SLOT_MASK
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LOG2_E, find_segment_sequence, first_segment
from fsa_core.kernels.sorted_index import NO_SEGMENT, SortedIndex, sorted_index
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, padded_dim, search_steps
from fsa_core.problem import Problem

DELTA_ROWS = 16
SUM_ROWS = 8


@kernel
def _delta(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    delta_ptr,
    num_tokens,
    first_kv_head,
    NUM_Q_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta float32 [KV heads, tokens, GROUP_SIZE], of the KV heads from ``first_kv_head`` on."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tokens = rows // GROUP_SIZE
    row_mask = tokens < num_tokens
    places = tokens * NUM_Q_HEADS + (first_kv_head + tl.program_id(1)) * GROUP_SIZE + rows % GROUP_SIZE
    dims = tl.arange(0, VALUE_DIM_PADDED)
    mask = row_mask[:, None] & (dims < VALUE_DIM)[None, :]
    out = tl.load(out_ptr + places[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    grad_out = tl.load(grad_out_ptr + places[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + places, mask=row_mask, other=0.0)
    first_row = tl.program_id(1).to(tl.int64) * num_tokens * GROUP_SIZE
    tl.store(delta_ptr + first_row + rows, delta, mask=row_mask)


@kernel
def _gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    partial_ptr,
    sum_ptr,
    split_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    item_segment_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    total_q,
    first_token,
    num_tokens,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    max_items,
    max_splits,
    first_kv_head,
    rank,
    chunk,
    first_range_segment,
    range_segments,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PER_ITEM: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    WITH_QUERIES: tl.constexpr,
):
    """One work item under KEYS keys of its block.

    WITH_QUERIES writes partial [KV heads, tokens, slots, parts, HEADS_PER_PAIR, HEAD_DIM] at the rows' own
    (token, slot). WITH_KEYS adds to sum [KV heads, range segments, BLOCK_SIZE, HEAD_DIM +
    VALUE_DIM], which holds grad_k (not scaled) beside grad_v, if it is the only item of its segment, and
    otherwise writes split [KV heads, max_splits, BLOCK_SIZE, HEAD_DIM + VALUE_DIM].
    """
    item = tl.program_id(0)
    group_head = tl.program_id(1)
    part = tl.program_id(2)
    kv_head = first_kv_head + group_head
    index_head = group_head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + chunk
    item_offsets_ptr += row * (num_segments + 1)
    if item >= tl.load(item_offsets_ptr + num_segments):
        return
    segment = tl.load(item_segment_ptr + tl.cast(row, tl.int64) * max_items + item)
    range_segment = segment - first_range_segment
    # No condition of both: the first is known when the kernel is compiled, and removes the second.
    if WITH_KEYS:  # noqa: SIM102
        if (range_segment < 0) | (range_segment >= range_segments):
            return
    sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
    block_start = (segment - first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE)) * BLOCK_SIZE
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    q_shift = k_length - (tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start) - q_start
    segment_start = tl.load(offsets_ptr + row * num_segments + segment)
    num_pairs = tl.load(offsets_ptr + row * num_segments + segment + 1) - segment_start
    first_item = tl.load(item_offsets_ptr + segment)
    first_pair = (item - first_item) * PAIRS_PER_ITEM
    num_pairs = tl.minimum(num_pairs - first_pair, PAIRS_PER_ITEM)
    pairs_ptr += segment_start + first_pair

    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    part_keys = part * KEYS + tl.arange(0, KEYS)
    keys = block_start + part_keys
    key_mask = keys < k_length
    key_rows = (k_start + keys).to(tl.int64) * NUM_KV_HEADS + kv_head
    k_mask = key_mask[:, None] & dim_mask[None, :]
    v_mask = key_mask[:, None] & value_mask[None, :]
    k = tl.load(k_ptr + key_rows[:, None] * HEAD_DIM + dims[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptr + key_rows[:, None] * VALUE_DIM + value_dims[None, :], mask=v_mask, other=0.0)
    grad_k = tl.zeros((KEYS, HEAD_DIM_PADDED), tl.float32)
    grad_v = tl.zeros((KEYS, VALUE_DIM_PADDED), tl.float32)

    # A tile is whole pairs, so that what a row is of its pair is the same in every tile. Offsets count from
    # the chunk's first token and fit 32 bits.
    pair_in_tile = tl.arange(0, ROWS) // HEADS_PER_PAIR
    head_in_pair = tl.arange(0, ROWS) % HEADS_PER_PAIR
    first_head = rank * HEADS_PER_PAIR
    first_q_row = tl.cast(first_token, tl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE + first_head
    q_ptr += first_q_row * HEAD_DIM
    grad_out_ptr += first_q_row * VALUE_DIM
    lse_ptr += first_q_row
    delta_ptr += (group_head.to(tl.int64) * total_q + first_token) * GROUP_SIZE + first_head
    q_offsets = (head_in_pair * HEAD_DIM)[:, None] + dims[None, :]
    out_offsets = (head_in_pair * VALUE_DIM)[:, None] + value_dims[None, :]

    for start in range(0, num_pairs, PAIRS):
        pair_number = start + pair_in_tile
        row_mask = (pair_in_tile < PAIRS) & (pair_number < num_pairs)
        pairs = tl.load(pairs_ptr + pair_number, mask=row_mask, other=0)
        chunk_token = pairs >> SLOT_BITS
        q_mask = row_mask[:, None] & dim_mask[None, :]
        q_ptrs = q_ptr + ((chunk_token * (NUM_Q_HEADS * HEAD_DIM))[:, None] + q_offsets)
        q = tl.load(q_ptrs, mask=q_mask, other=0.0)
        out_mask = row_mask[:, None] & value_mask[None, :]
        grad_out_ptrs = grad_out_ptr + ((chunk_token * (NUM_Q_HEADS * VALUE_DIM))[:, None] + out_offsets)
        grad_out = tl.load(grad_out_ptrs, mask=out_mask, other=0.0)
        lse = tl.load(lse_ptr + chunk_token * NUM_Q_HEADS + head_in_pair, mask=row_mask, other=0.0)
        delta = tl.load(delta_ptr + chunk_token * GROUP_SIZE + head_in_pair, mask=row_mask, other=0.0)
        # Keys down, rows across: the weights are then the left operand of the keys' gradients as they are.
        scores = tl.dot(k, tl.trans(q), input_precision="tf32x3")
        # A row that sees no key has lse = -inf and no weights. Rows past the last have nothing but zeros in q
        # and grad_out, and so no share in any sum; keys past the end of the sequence come after every token.
        shift = tl.where(lse == float("-inf"), 0.0, lse) * LOG2_E
        weights = tl.exp2(scores * (scale * LOG2_E) - shift[None, :])
        positions = chunk_token + (first_token + q_shift)
        visible = keys[:, None] <= positions[None, :] if CAUSAL else key_mask[:, None]
        weights = tl.where(visible, weights, 0.0)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="tf32x3")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(k.dtype)
        if WITH_KEYS:
            grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision="tf32x3")
            grad_k = tl.dot(grad_scores, q, grad_k, input_precision="tf32x3")
        if WITH_QUERIES:
            grad_q = tl.dot(tl.trans(grad_scores), k, input_precision="tf32x3")
            place = (group_head * num_tokens + chunk_token) * num_slots + (pairs & SLOT_MASK)
            place = (place * (BLOCK_SIZE // KEYS) + part) * HEADS_PER_PAIR
            partial_ptrs = partial_ptr + ((place * HEAD_DIM)[:, None] + q_offsets)
            # Scaled here: a share that was not might overflow float16.
            tl.store(partial_ptrs, (grad_q * scale).to(partial_ptr.dtype.element_ty), mask=q_mask)

    if WITH_KEYS:
        width = HEAD_DIM + VALUE_DIM
        split = tl.load(split_offsets_ptr + row * (num_segments + 1) + segment) + item - first_item
        is_split = tl.load(item_offsets_ptr + segment + 1) - first_item > 1
        sum_rows = (group_head.to(tl.int64) * range_segments + range_segment) * BLOCK_SIZE + part_keys
        split_rows = (group_head.to(tl.int64) * max_splits + split) * BLOCK_SIZE + part_keys
        if is_split:
            k_ptrs = split_ptr + split_rows[:, None] * width + dims[None, :]
            v_ptrs = split_ptr + split_rows[:, None] * width + HEAD_DIM + value_dims[None, :]
        else:
            k_ptrs = sum_ptr + sum_rows[:, None] * width + dims[None, :]
            v_ptrs = sum_ptr + sum_rows[:, None] * width + HEAD_DIM + value_dims[None, :]
            grad_k += tl.load(k_ptrs, mask=k_mask, other=0.0)
            grad_v += tl.load(v_ptrs, mask=v_mask, other=0.0)
        tl.store(k_ptrs, grad_k, mask=k_mask)
        tl.store(v_ptrs, grad_v, mask=v_mask)


@kernel
def _sum_items(
    sum_ptr,
    split_ptr,
    grad_k_ptr,
    grad_v_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    cu_seqlens_k_ptr,
    scale,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    max_splits,
    first_kv_head,
    chunk,
    first_range_segment,
    range_segments,
    is_last,
    NUM_KV_HEADS: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds a segment's items to its sum, in their order; the last chunk writes grad_k and grad_v."""
    range_segment = tl.program_id(0)
    group_head = tl.program_id(1)
    part_keys = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    segment = first_range_segment + range_segment
    row = (group_head if INDEX_PER_HEAD else 0) * num_chunks + chunk
    item_offsets_ptr += row * (num_segments + 1) + segment
    num_items = tl.load(item_offsets_ptr + 1) - tl.load(item_offsets_ptr)
    if (num_items <= 1) & (is_last == 0):
        return
    dims = tl.arange(0, WIDTH_PADDED)
    mask = (dims < HEAD_DIM + VALUE_DIM)[None, :] & (part_keys < BLOCK_SIZE)[:, None]
    place = part_keys[:, None] * (HEAD_DIM + VALUE_DIM) + dims[None, :]
    block_numbers: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + VALUE_DIM)
    sum_ptrs = sum_ptr + (group_head.to(tl.int64) * range_segments + range_segment) * block_numbers + place
    total = tl.load(sum_ptrs, mask=mask, other=0.0)
    if num_items > 1:
        split = group_head.to(tl.int64) * max_splits
        split += tl.load(split_offsets_ptr + row * (num_segments + 1) + segment)
        for item in range(num_items):
            total += tl.load(split_ptr + (split + item) * block_numbers + place, mask=mask, other=0.0)
    if is_last != 0:
        sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
        keys = (segment - first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE)) * BLOCK_SIZE + part_keys
        k_start = tl.load(cu_seqlens_k_ptr + sequence)
        exists = mask & (keys < tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start)[:, None]
        key_rows = ((k_start + keys).to(tl.int64) * NUM_KV_HEADS + first_kv_head + group_head)[:, None]
        of_k = (dims < HEAD_DIM)[None, :]
        grad_k = (total * scale).to(grad_k_ptr.dtype.element_ty)
        tl.store(grad_k_ptr + key_rows * HEAD_DIM + dims[None, :], grad_k, mask=exists & of_k)
        grad_v = total.to(grad_v_ptr.dtype.element_ty)
        tl.store(grad_v_ptr + key_rows * VALUE_DIM + dims[None, :] - HEAD_DIM, grad_v, mask=exists & ~of_k)
    else:
        tl.store(sum_ptrs, total, mask=mask)


@kernel
def _sum_slots(
    partial_ptr,
    keys_ptr,
    grad_q_ptr,
    first_token,
    num_tokens,
    chunk_tokens,
    num_slots,
    group_tokens,
    first_kv_head,
    rank,
    chunk,
    NUM_Q_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the shares of ROWS (token, query head) rows of grad_q [total_q, q heads, dim], slot by slot."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group_head = tl.program_id(1)
    tokens = rows // HEADS_PER_PAIR
    row_mask = tokens < num_tokens
    heads = rows % HEADS_PER_PAIR
    dims = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    index_head = group_head if INDEX_PER_HEAD else 0
    key_ptrs = (
        keys_ptr + (tl.cast(index_head, tl.int64) * group_tokens + chunk * chunk_tokens + tokens) * num_slots
    )
    first_pair = (group_head.to(tl.int64) * num_tokens + tokens) * num_slots
    acc = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    for slot in range(num_slots):
        used = tl.load(key_ptrs + slot, mask=row_mask, other=NO_SEGMENT) != NO_SEGMENT
        mask = used[:, None] & dim_mask[None, :]
        for part in tl.static_range(PARTS):
            place = ((first_pair + slot) * PARTS + part) * HEADS_PER_PAIR + heads
            share = tl.load(partial_ptr + place[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
            acc += share.to(tl.float32)
    q_heads = (first_kv_head + group_head) * GROUP_SIZE + rank * HEADS_PER_PAIR + heads
    places = (first_token + tokens).to(tl.int64) * NUM_Q_HEADS + q_heads
    tl.store(
        grad_q_ptr + places[:, None] * HEAD_DIM + dims[None, :],
        acc.to(grad_q_ptr.dtype.element_ty),
        mask=row_mask[:, None] & dim_mask[None, :],
    )


def selected_attention_backward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    *,
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of selected attention over packed sequences; every tensor contiguous and on one device.

    q [total_q, num_q_heads, head_dim], k [total_k, num_kv_heads, head_dim], v [total_k, num_kv_heads,
    value_dim], block_indices int32 [index_heads, total_q, slots], cu_seqlens int32 [num_sequences + 1]; out,
    grad_out [total_q, num_q_heads, value_dim] and lse, grad_lse float32 [total_q, num_q_heads], total_q > 0.
    Returns the gradients of q, k and v, in their shapes and dtypes.
    """
    p, plan = problem, plan_backward(problem, workspace_limit_bytes)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    delta = q.new_empty(plan.kv_heads, p.num_q_tokens, p.group_size, dtype=torch.float32)
    call = _Call(p, plan, (q, k, v, grad_out, lse, delta), grads, block_indices, cu_seqlens_q, cu_seqlens_k)
    for first_kv_head in range(0, p.num_kv_heads, plan.kv_heads):
        num_kv_heads = min(plan.kv_heads, p.num_kv_heads - first_kv_head)
        _delta[-(-p.num_q_tokens * p.group_size // DELTA_ROWS), num_kv_heads](
            out, grad_out, grad_lse, delta, p.num_q_tokens, first_kv_head, NUM_Q_HEADS=p.num_q_heads,
            GROUP_SIZE=p.group_size, VALUE_DIM=p.value_dim, VALUE_DIM_PADDED=padded_dim(p.value_dim),
            ROWS=DELTA_ROWS,
        )  # fmt: skip
        for one in plan.passes:
            starts = range(0, plan.segments, plan.range_segments) if one.with_keys else (0,)
            for start in starts:
                _walk(call, one, _Workspace.of(call, one), first_kv_head, num_kv_heads, start)
    return grads


@dataclass(frozen=True, slots=True)
class _Call:
    """What does not change from launch to launch; ``operands`` are q, k, v, grad_out, lse and delta."""

    problem: Problem
    plan: BackwardPlan
    operands: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    block_indices: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Workspace:
    """Partial gradients: ``partial`` of q; ``sums`` and ``splits`` of k and v, as ``_gradients`` has them."""

    partial: torch.Tensor
    sums: torch.Tensor
    splits: torch.Tensor

    @classmethod
    def of(cls, call: _Call, one: Pass) -> "_Workspace":
        p, plan, q = call.problem, call.plan, call.operands[0]
        pairs = plan.kv_heads * one.chunk_tokens * p.num_slots * one.with_queries
        rows = pairs * (p.block_size // plan.tile_keys) * plan.heads_per_pair
        block = (p.block_size, p.head_dim + p.value_dim)
        return cls(
            partial=q.new_empty(rows, p.head_dim),
            sums=q.new_zeros(plan.kv_heads * one.with_keys, plan.range_segments, *block, dtype=torch.float32),
            splits=q.new_empty(plan.kv_heads * one.with_keys, one.max_splits, *block, dtype=torch.float32),
        )


def _walk(
    call: _Call,
    one: Pass,
    workspace: _Workspace,
    first_kv_head: int,
    num_kv_heads: int,
    first_range_segment: int,
) -> None:
    """All pairs of some KV heads: gradients of q, and those of the keys in a range of KV blocks."""
    p, plan = call.problem, call.plan
    ranks = plan.tile_heads_per_kv_head
    # Tile heads of one KV head come one after the other: they add to the same gradients of keys.
    ids_of_rank = call.block_indices.unflatten(0, (-1, ranks))
    for rank in range(ranks):
        ids = ids_of_rank[:, rank]
        if plan.index_per_head:
            ids = ids[first_kv_head : first_kv_head + num_kv_heads]
        for first_token in range(0, p.num_q_tokens, one.group_tokens):
            num_tokens = min(one.group_tokens, p.num_q_tokens - first_token)
            index = sorted_index(
                ids, call.cu_seqlens_q, call.cu_seqlens_k, first_token=first_token, num_tokens=num_tokens,
                chunk_tokens=one.chunk_tokens, num_segments=plan.segments, block_size=p.block_size,
                pairs_per_item=one.pairs_per_item, max_items=one.max_items,
            )  # fmt: skip
            for chunk in range(-(-num_tokens // one.chunk_tokens)):
                place = _Place(first_token, num_tokens, chunk, rank, first_kv_head, num_kv_heads)
                _launch(call, one, workspace, index, place, first_range_segment)


@dataclass(frozen=True, slots=True)
class _Place:
    """A chunk of a group of tokens, under tile head ``rank`` of each of some KV heads."""

    group_first_token: int
    group_tokens: int
    chunk: int
    rank: int
    first_kv_head: int
    num_kv_heads: int


def _launch(
    call: _Call, one: Pass, workspace: _Workspace, index: SortedIndex, place: _Place, first_range_segment: int
) -> None:
    p, plan, at = call.problem, call.plan, place
    first_token = at.group_first_token + at.chunk * one.chunk_tokens
    num_tokens = min(one.chunk_tokens, at.group_first_token + at.group_tokens - first_token)
    num_chunks = -(-at.group_tokens // one.chunk_tokens)
    range_segments = min(plan.range_segments, plan.segments - first_range_segment)
    steps = search_steps(p.num_sequences)
    parts = p.block_size // plan.tile_keys
    q_heads = {
        "NUM_Q_HEADS": p.num_q_heads, "HEADS_PER_PAIR": plan.heads_per_pair, "GROUP_SIZE": p.group_size,
    }  # fmt: skip
    shared = {"INDEX_PER_HEAD": plan.index_per_head, "HEAD_DIM": p.head_dim}
    blocks = {
        "NUM_KV_HEADS": p.num_kv_heads, "VALUE_DIM": p.value_dim, "BLOCK_SIZE": p.block_size,
        "KEYS": plan.tile_keys,
    }  # fmt: skip
    _gradients[one.max_items, at.num_kv_heads, parts](
        *call.operands, workspace.partial, workspace.sums, workspace.splits, index.pairs, index.offsets,
        index.item_offsets, index.split_offsets, index.item_segment, call.cu_seqlens_q, call.cu_seqlens_k,
        p.softmax_scale, p.num_q_tokens, first_token, num_tokens, p.num_slots, p.num_sequences, steps,
        plan.segments, num_chunks, one.max_items, one.max_splits,
        at.first_kv_head, at.rank, at.chunk, first_range_segment, range_segments, **shared, **q_heads,
        **blocks, HEAD_DIM_PADDED=padded_dim(p.head_dim), VALUE_DIM_PADDED=padded_dim(p.value_dim),
        CAUSAL=p.causal, ROWS=plan.tile_rows, PAIRS=plan.tile_pairs, PAIRS_PER_ITEM=one.pairs_per_item,
        WITH_KEYS=one.with_keys, WITH_QUERIES=one.with_queries, num_warps=plan.num_warps, num_stages=1,
    )  # fmt: skip
    if one.with_keys:
        is_last = at.rank == plan.tile_heads_per_kv_head - 1 and first_token + num_tokens == p.num_q_tokens
        _sum_items[range_segments, at.num_kv_heads, parts](
            workspace.sums, workspace.splits, call.grads[1], call.grads[2], index.item_offsets,
            index.split_offsets, call.cu_seqlens_k, p.softmax_scale, p.num_sequences, steps, plan.segments,
            num_chunks, one.max_splits, at.first_kv_head, at.chunk, first_range_segment, range_segments,
            int(is_last), **shared, **blocks, WIDTH_PADDED=padded_dim(p.head_dim + p.value_dim),
        )  # fmt: skip
    if one.with_queries:
        _sum_slots[-(-num_tokens * plan.heads_per_pair // SUM_ROWS), at.num_kv_heads](
            workspace.partial, index.keys, call.grads[0], first_token, num_tokens,
            one.chunk_tokens, p.num_slots, at.group_tokens, at.first_kv_head, at.rank, at.chunk, **shared,
            **q_heads, HEAD_DIM_PADDED=padded_dim(p.head_dim), PARTS=parts, ROWS=SUM_ROWS, num_warps=1,
        )  # fmt: skip

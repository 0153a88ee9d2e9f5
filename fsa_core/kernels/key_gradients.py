"""Gradients of k and v of selected attention: KV blocks outside, the query tokens that chose them inside.

A work item of the sorted index loads its K/V block once, walks its rows (pairs x query heads) with the
block's gradients in registers, and writes them; the items of a block that has several are added in their
order. Each pair's share of grad_q is written beside and summed, if the plan says so. Arithmetic: backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from fsa_core.backward_plan import BackwardPlan, KeyPlan
from fsa_core.kernels import hopper
from fsa_core.kernels.block_share import Operands
from fsa_core.kernels.launch import Kernel, kernel
from fsa_core.kernels.primitives import LOG2_E, find_segment_sequence, first_segment
from fsa_core.kernels.replay import Memory, clear
from fsa_core.kernels.share_sums import sum_shares
from fsa_core.kernels.sorted_index import SortedIndex, new_sorted_index, sort_pairs
from fsa_core.plan import Chunk
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, search_steps

# Few keys a program: a block that everybody chose has many items to add. So many are on their way at once.
SUM_KEYS = 8
SUM_STAGES = tl.constexpr(4)


@kernel
def _gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    shares_ptr,
    sums_ptr,
    splits_ptr,
    grad_k_ptr,
    grad_v_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    split_offsets_ptr,
    item_segment_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
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
    num_kv_heads,
    first_index_head,
    first_delta_head,
    num_delta_heads,
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
    WITH_SUMS: tl.constexpr,
    WITH_QUERIES: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One work item under KEYS keys of its block.

    An item that is one of several of its segment writes splits [KV heads, max_splits, BLOCK_SIZE, HEAD_DIM +
    VALUE_DIM], which hold grad_k (not scaled) beside grad_v. Any other writes grad_k and grad_v; WITH_SUMS,
    it adds to sums [KV heads, range segments, BLOCK_SIZE, HEAD_DIM + VALUE_DIM]. WITH_QUERIES, of blocks that
    are whole: shares of grad_q [KV heads, tokens, slots, HEADS_PER_PAIR, HEAD_DIM], at the rows' own slots.
    """
    # The first items of all heads come first: a block that everybody chose is the first, and its items the
    # longest.
    item = tl.program_id(0) // num_kv_heads
    group_head = tl.program_id(0) % num_kv_heads
    part = tl.program_id(1)
    kv_head = first_kv_head + group_head
    index_head = first_index_head + group_head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + chunk
    item_offsets_ptr += row * (num_segments + 1)
    if item >= tl.load(item_offsets_ptr + num_segments):
        return
    segment = tl.load(item_segment_ptr + tl.cast(row, tl.int64) * max_items + item)
    range_segment = segment - first_range_segment
    # No condition of both: the first is known when the kernel is compiled, and removes the second.
    if WITH_SUMS:  # noqa: SIM102
        if (range_segment < 0) | (range_segment >= range_segments):
            return
    sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
    block_start = (segment - first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE)) * BLOCK_SIZE
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    q_shift = k_length - (tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start) - q_start
    offsets_ptr += row * (num_segments + 1) + segment
    segment_start = tl.load(offsets_ptr)
    num_pairs = tl.load(offsets_ptr + 1) - segment_start
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
    k_mask = key_mask[:, None] & dim_mask[None, :]
    v_mask = key_mask[:, None] & value_mask[None, :]
    # A program's keys lie at small offsets from its first.
    first_key_row = (k_start + block_start + part * KEYS).to(tl.int64) * NUM_KV_HEADS + kv_head
    k_offsets = (tl.arange(0, KEYS) * (NUM_KV_HEADS * HEAD_DIM))[:, None] + dims[None, :]
    v_offsets = (tl.arange(0, KEYS) * (NUM_KV_HEADS * VALUE_DIM))[:, None] + value_dims[None, :]
    k = tl.load(k_ptr + first_key_row * HEAD_DIM + k_offsets, mask=k_mask, other=0.0)
    v = tl.load(v_ptr + first_key_row * VALUE_DIM + v_offsets, mask=v_mask, other=0.0)
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
    delta_ptr += tl.cast(first_token, tl.int64) * num_delta_heads
    delta_ptr += kv_head * GROUP_SIZE + first_head - first_delta_head
    q_offsets = (head_in_pair * HEAD_DIM)[:, None] + dims[None, :]
    out_offsets = (head_in_pair * VALUE_DIM)[:, None] + value_dims[None, :]

    for start in tl.range(0, num_pairs, PAIRS, num_stages=STAGES):
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
        delta = tl.load(delta_ptr + chunk_token * num_delta_heads + head_in_pair, mask=row_mask, other=0.0)
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
        grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision="tf32x3")
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="tf32x3")
        if WITH_QUERIES:
            grad_q = tl.dot(tl.trans(grad_scores), k, input_precision="tf32x3")
            place = (group_head * num_tokens + chunk_token) * num_slots + (pairs & ((1 << SLOT_BITS) - 1))
            share_ptrs = shares_ptr + ((place * (HEADS_PER_PAIR * HEAD_DIM))[:, None] + q_offsets)
            # Scaled here: a share that was not might overflow float16.
            tl.store(share_ptrs, (grad_q * scale).to(shares_ptr.dtype.element_ty), mask=q_mask)

    width = HEAD_DIM + VALUE_DIM
    if tl.load(item_offsets_ptr + segment + 1) - first_item > 1:
        split = tl.load(split_offsets_ptr + row * (num_segments + 1) + segment) + item - first_item
        rows = (group_head.to(tl.int64) * max_splits + split) * BLOCK_SIZE + part_keys
        numbers = splits_ptr + rows[:, None] * width
        tl.store(numbers + dims[None, :], grad_k, mask=k_mask)
        tl.store(numbers + HEAD_DIM + value_dims[None, :], grad_v, mask=v_mask)
    elif WITH_SUMS:
        rows = (group_head.to(tl.int64) * range_segments + range_segment) * BLOCK_SIZE + part_keys
        k_ptrs = sums_ptr + rows[:, None] * width + dims[None, :]
        v_ptrs = sums_ptr + rows[:, None] * width + HEAD_DIM + value_dims[None, :]
        tl.store(k_ptrs, grad_k + tl.load(k_ptrs, mask=k_mask, other=0.0), mask=k_mask)
        tl.store(v_ptrs, grad_v + tl.load(v_ptrs, mask=v_mask, other=0.0), mask=v_mask)
    else:
        k_ptrs = grad_k_ptr + first_key_row * HEAD_DIM + k_offsets
        v_ptrs = grad_v_ptr + first_key_row * VALUE_DIM + v_offsets
        tl.store(k_ptrs, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=k_mask)
        tl.store(v_ptrs, grad_v.to(grad_v_ptr.dtype.element_ty), mask=v_mask)


@kernel
def _sum_items(
    sums_ptr,
    splits_ptr,
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
    num_kv_heads,
    first_index_head,
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
    WITH_SUMS: tl.constexpr,
):
    """Adds a segment's items in their order, to its sum if there are sums.

    Writes grad_k and grad_v, unless the segment's only item has, or the sum if this is not the last chunk.
    """
    # Blocks that everybody chose are the first, as in ``_gradients``, and have the most to add.
    parts: tl.constexpr = BLOCK_SIZE // KEYS
    part_keys = tl.program_id(0) % parts * KEYS + tl.arange(0, KEYS)
    group_head = tl.program_id(0) // parts % num_kv_heads
    range_segment = tl.program_id(0) // parts // num_kv_heads
    segment = first_range_segment + range_segment
    row = (first_index_head + group_head if INDEX_PER_HEAD else 0) * num_chunks + chunk
    item_offsets_ptr += row * (num_segments + 1) + segment
    num_items = tl.load(item_offsets_ptr + 1) - tl.load(item_offsets_ptr)
    if WITH_SUMS:
        if (num_items <= 1) & (is_last == 0):
            return
    elif num_items == 1:
        return
    dims = tl.arange(0, WIDTH_PADDED)
    mask = (dims < HEAD_DIM + VALUE_DIM)[None, :] & (part_keys < BLOCK_SIZE)[:, None]
    place = part_keys[:, None] * (HEAD_DIM + VALUE_DIM) + dims[None, :]
    block_numbers: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + VALUE_DIM)
    sum_ptrs = sums_ptr + (group_head.to(tl.int64) * range_segments + range_segment) * block_numbers + place
    total = tl.zeros((KEYS, WIDTH_PADDED), tl.float32)
    if WITH_SUMS:
        total = tl.load(sum_ptrs, mask=mask, other=0.0)
    if num_items > 1:
        split = group_head.to(tl.int64) * max_splits
        split += tl.load(split_offsets_ptr + row * (num_segments + 1) + segment)
        for item in tl.range(0, num_items, num_stages=SUM_STAGES):
            total += tl.load(splits_ptr + (split + item) * block_numbers + place, mask=mask, other=0.0)
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


@dataclass(frozen=True, slots=True)
class Call:
    """What does not change from launch to launch."""

    problem: Problem
    plan: BackwardPlan
    given: Operands
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    block_indices: torch.Tensor

    @classmethod
    def of(
        cls,
        problem: Problem,
        plan: BackwardPlan,
        kv_heads: range,
        tensors: tuple[torch.Tensor, ...],
        delta: torch.Tensor,
        grad_lse: torch.Tensor | None,
    ) -> "Call":
        """``tensors`` as ``selected_attention_backward`` has them; ``delta`` is that of ``kv_heads``."""
        q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, out, lse, grad_out, *grads = tensors
        given = Operands(
            q, k, v, out, grad_out, lse, grad_lse, delta, cu_seqlens_q, cu_seqlens_k,
            first_delta_head=kv_heads.start * problem.group_size,
        )  # fmt: skip
        return cls(problem, plan, given, (grads[0], grads[1], grads[2]), block_indices)


@dataclass(slots=True)
class Workspace:
    """``shares`` of grad_q, and ``sums`` and ``splits`` of grad_k and grad_v, as ``_gradients`` has them.

    ``indexed``: what the index holds, as ``sort`` has it; the KV heads by their first.
    """

    index: SortedIndex
    shares: torch.Tensor
    sums: torch.Tensor
    splits: torch.Tensor
    indexed: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, call: Call, memory: Memory) -> "Workspace":
        p, plan, keys = call.problem, call.plan, call.plan.keys
        heads = keys.launch_heads
        pairs = heads * keys.chunk_tokens * p.num_slots * keys.with_queries
        block = (p.block_size, p.head_dim + p.value_dim)
        return cls(
            index=new_sorted_index(
                memory, num_heads=keys.kv_heads if plan.index_per_head else 1, num_tokens=keys.group_tokens,
                chunk_tokens=keys.chunk_tokens, num_slots=p.num_slots, num_segments=plan.segments,
                max_items=keys.max_items,
            ),
            shares=memory.new_empty(pairs * p.heads_per_pair, p.head_dim),
            sums=memory.new_empty(heads * keys.has_sums, keys.range_segments, *block, dtype=torch.float32),
            splits=memory.new_empty(heads, keys.max_splits, *block, dtype=torch.float32),
        )  # fmt: skip


def parts(heads: range, most: int) -> Iterator[range]:
    for start in range(heads.start, heads.stop, most):
        yield range(start, min(start + most, heads.stop))


def sort(call: Call, workspace: Workspace, kv_heads: range, rank: int = 0, first_token: int = 0) -> None:
    """Indexes a group of tokens under tile head ``rank`` of each of some KV heads, unless they are indexed.

    The first that ``walk`` needs can be asked for before, by those who have something to do meanwhile.
    """
    p, plan, keys, ranks = call.problem, call.plan, call.plan.keys, call.plan.tile_heads_per_kv_head
    asked = (kv_heads.start, rank, first_token)
    if workspace.indexed == asked:
        return
    workspace.indexed = asked
    sort_pairs(
        workspace.index, call.block_indices, call.given.cu_seqlens_q, call.given.cu_seqlens_k,
        first_token=first_token, num_tokens=min(keys.group_tokens, p.num_q_tokens - first_token),
        chunk_tokens=keys.chunk_tokens,
        first_head=kv_heads.start * ranks + rank if plan.index_per_head else 0, head_step=ranks,
        block_size=p.block_size, pairs_per_item=keys.pairs_per_item, slot_bits=keys.slot_bits,
    )  # fmt: skip


def walk(call: Call, workspace: Workspace, kv_heads: range, first_range_segment: int) -> None:
    """All pairs of some KV heads, for the gradients of the keys in a range of KV blocks."""
    p, plan, keys = call.problem, call.plan, call.plan.keys
    if keys.has_sums:
        clear(workspace.sums)
    # Tile heads of one KV head come one after the other: they add to the same gradients of keys.
    for rank in range(plan.tile_heads_per_kv_head):
        for first_token in range(0, p.num_q_tokens, keys.group_tokens):
            num_tokens = min(keys.group_tokens, p.num_q_tokens - first_token)
            sort(call, workspace, kv_heads, rank, first_token)
            for launched in parts(kv_heads, keys.launch_heads):
                index_head = launched.start - kv_heads.start
                for chunk in range(-(-num_tokens // keys.chunk_tokens)):
                    start = first_token + chunk * keys.chunk_tokens
                    chunk_tokens = min(keys.chunk_tokens, first_token + num_tokens - start)
                    at = Chunk(chunk, start, chunk_tokens, launched.start, len(launched), index_head)
                    _launch(call, workspace, at, rank, first_range_segment)


def _key_kernel(problem: Problem, keys: KeyPlan, device: torch.device) -> tuple[Kernel, dict[str, Any]]:
    """The kernel of a work item for this device, and the constants that it alone has."""
    p = problem
    if hopper.runs_on(device):
        from fsa_core.kernels import hopper_key_gradients

        if hopper_key_gradients.takes(p, keys):
            return hopper_key_gradients.gradients, hopper_key_gradients.constants()
    return _gradients, {
        "HEAD_DIM_PADDED": padded_dim(p.head_dim), "VALUE_DIM_PADDED": padded_dim(p.value_dim),
        "ROWS": keys.tile_rows, "KEYS": keys.tile_keys, "WITH_QUERIES": keys.with_queries,
        "STAGES": keys.num_stages, "num_warps": keys.num_warps, "num_stages": 1,
    }  # fmt: skip


def _launch(call: Call, workspace: Workspace, at: Chunk, rank: int, first_range_segment: int) -> None:
    """A chunk of tokens under tile head ``rank`` of each of some KV heads, which are the heads of ``at``."""
    p, plan, keys, given = call.problem, call.plan, call.plan.keys, call.given
    range_segments = min(keys.range_segments, plan.segments - first_range_segment)
    index, steps = workspace.index, search_steps(p.num_sequences)
    num_chunks = index.item_segment.shape[0] // index.ranks.shape[0]
    shapes = {
        "NUM_KV_HEADS": p.num_kv_heads, "INDEX_PER_HEAD": plan.index_per_head, "HEAD_DIM": p.head_dim,
        "VALUE_DIM": p.value_dim, "BLOCK_SIZE": p.block_size, "WITH_SUMS": keys.has_sums,
    }  # fmt: skip
    gradients_of_keys, own = _key_kernel(p, keys, given.q.device)
    gradients_of_keys[keys.max_items * at.num_heads, p.block_size // keys.tile_keys](
        *given.tensors, workspace.shares, workspace.sums, workspace.splits, call.grads[1], call.grads[2],
        index.pairs, index.offsets, index.item_offsets, index.split_offsets, index.item_segment,
        given.cu_seqlens_q, given.cu_seqlens_k, p.softmax_scale, at.first_token, at.num_tokens, p.num_slots,
        p.num_sequences, steps, plan.segments, num_chunks, keys.max_items, keys.max_splits, at.first_head,
        at.num_heads, at.first_index_head, given.first_delta_head, given.delta.shape[1], rank, at.number,
        first_range_segment, range_segments, **shapes, NUM_Q_HEADS=p.num_q_heads,
        HEADS_PER_PAIR=p.heads_per_pair, GROUP_SIZE=p.group_size, CAUSAL=p.causal, PAIRS=keys.tile_pairs,
        PAIRS_PER_ITEM=keys.pairs_per_item, SLOT_BITS=keys.slot_bits, **own,
    )  # fmt: skip
    is_last = rank == plan.tile_heads_per_kv_head - 1 and at.first_token + at.num_tokens == p.num_q_tokens
    sum_keys = min(SUM_KEYS, p.block_size)
    _sum_items[(range_segments * at.num_heads * (p.block_size // sum_keys),)](
        workspace.sums, workspace.splits, call.grads[1], call.grads[2], index.item_offsets,
        index.split_offsets, given.cu_seqlens_k, p.softmax_scale, p.num_sequences, steps, plan.segments,
        num_chunks, keys.max_splits, at.first_head, at.num_heads, at.first_index_head, at.number,
        first_range_segment, range_segments, int(is_last), **shapes,
        WIDTH_PADDED=padded_dim(p.head_dim + p.value_dim), KEYS=sum_keys,
    )  # fmt: skip
    if keys.with_queries:
        sum_shares(
            p, at, workspace.shares, index.ranks, index.item_offsets, call.grads[0],
            chunk_tokens=keys.chunk_tokens, group_pairs=p.num_q_tokens * p.num_slots, num_chunks=1,
            with_shared=False,
        )  # fmt: skip

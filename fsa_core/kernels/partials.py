"""Partials of selected attention, of the pairs that an inversion lists, and their merge.

An item loads its K/V block once and attends its rows (pairs x query heads) tile by tile; each row's own
softmax maximum and sum, so a result does not depend on what shares its tile. The merge weighs each row's
slots by their log-sum-exp, in slot order, without atomics. Both are one kernel on Hopper, hopper_partials.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.index import SLOT_BITS, SLOT_MASK, Inversion, load_item, new_inversion
from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors
from fsa_core.kernels.primitives import LN_2, LOG2_E, find_block, finite, reciprocal
from fsa_core.kernels.query_tiles import mixed_programs
from fsa_core.kernels.replay import Memory
from fsa_core.plan import ForwardPlan, Group, chunks
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, search_steps

# Measured: one warp with eight rows reads the partials fastest.
MERGE_ROWS = 8
MERGE_WARPS = 1
# Of a block whose partials the kernel for Hopper alone makes.
MOST_KEYS = 128


@triton.jit
def _scores(q, k, q_positions, k_positions, k_length, CAUSAL: tl.constexpr):
    """Scores [rows, keys], not scaled yet; -inf where a row may not see a key.

    Keys past the end of the sequence come after every token of it.
    """
    scores = tl.dot(q, k, input_precision="tf32x3")
    if CAUSAL:
        return tl.where(k_positions[None, :] <= q_positions[:, None], scores, float("-inf"))
    return tl.where((k_positions < k_length)[None, :], scores, float("-inf"))


@triton.jit
def _attend_item(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_out_ptr,
    partial_lse_ptr,
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
):
    """The rows of up to TILES_PER_ITEM tiles against one KV block; what it writes as ``_partial`` says."""
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
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    kv_head = head // TILE_HEADS_PER_KV_HEAD
    keys = block_start + tl.arange(0, KEYS)
    k_ptrs = (
        k_ptr + (((k_start + keys).to(tl.int64) * NUM_KV_HEADS + kv_head) * HEAD_DIM)[None, :] + dims[:, None]
    )
    v_ptrs = (
        v_ptr
        + (((k_start + keys).to(tl.int64) * NUM_KV_HEADS + kv_head) * VALUE_DIM)[:, None]
        + value_dims[None, :]
    )
    key_mask = keys < k_length
    k = tl.load(k_ptrs, mask=key_mask[None, :] & dim_mask[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=key_mask[:, None] & value_mask[None, :], other=0.0)

    # Offsets count from the chunk's first token and fit 32 bits.
    pair_in_tile = tl.arange(0, ROWS) // HEADS_PER_PAIR
    head_in_pair = tl.arange(0, ROWS) % HEADS_PER_PAIR
    q_ptr += (tl.cast(first_token, tl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR) * HEAD_DIM
    q_offsets = (head_in_pair * HEAD_DIM)[:, None] + dims[None, :]
    out_offsets = (head_in_pair * VALUE_DIM)[:, None] + value_dims[None, :]
    num_tiles = tl.minimum(TILES_PER_ITEM, tl.cdiv(num_pairs, pairs_in_tile))
    for tile in range(num_tiles):
        pair_number = tile * pairs_in_tile + pair_in_tile
        row_mask = (pair_in_tile < pairs_in_tile) & (pair_number < num_pairs)
        pairs = tl.load(pairs_ptr + pair_number, mask=row_mask, other=0)
        chunk_token = pairs >> SLOT_BITS
        q_ptrs = q_ptr + ((chunk_token * (NUM_Q_HEADS * HEAD_DIM))[:, None] + q_offsets)
        q = tl.load(q_ptrs, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
        positions = chunk_token + (first_token + q_shift)
        scores = _scores(q, k, positions, keys, k_length, CAUSAL)
        row_max = tl.max(scores, 1)
        weights = tl.exp2(scores * scale - (finite(row_max) * scale)[:, None])
        row_sum = tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
        for start in tl.static_range(KEYS, BLOCK_SIZE, KEYS):
            more_keys = keys + start
            more_mask = more_keys < k_length
            k_more = tl.load(
                k_ptrs + start * NUM_KV_HEADS * HEAD_DIM,
                mask=more_mask[None, :] & dim_mask[:, None],
                other=0.0,
            )
            v_more = tl.load(
                v_ptrs + start * NUM_KV_HEADS * VALUE_DIM,
                mask=more_mask[:, None] & value_mask[None, :],
                other=0.0,
            )
            scores = _scores(q, k_more, positions, more_keys, k_length, CAUSAL)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = finite(new_max)
            shrink = tl.exp2((row_max - shift) * scale)
            weights = tl.exp2(scores * scale - (shift * scale)[:, None])
            row_sum = row_sum * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v_more, input_precision="tf32x3")
            row_max = new_max
        place = ((chunk_head * num_tokens + chunk_token) * num_slots + (pairs & SLOT_MASK)) * HEADS_PER_PAIR
        out_ptrs = partial_out_ptr + ((place * VALUE_DIM)[:, None] + out_offsets)
        acc *= reciprocal(row_sum)[:, None]
        tl.store(
            out_ptrs, acc.to(partial_out_ptr.dtype.element_ty), mask=row_mask[:, None] & value_mask[None, :]
        )
        lse = row_max * scale + tl.log2(row_sum)
        tl.store(partial_lse_ptr + place + head_in_pair, lse, mask=row_mask)


@kernel
def _partial(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_out_ptr,
    partial_lse_ptr,
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
    ITEM_A_PROGRAM: tl.constexpr,
):
    """Attends the work items of a chunk: a program one, or every so many-th of them.

    Writes partial_out [heads, tokens, slots, HEADS_PER_PAIR, VALUE_DIM], normalised, and partial_lse (log2
    units) [heads, tokens, slots, HEADS_PER_PAIR] at the rows' own (token, slot).
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
            _attend_item(
                q_ptr, k_ptr, v_ptr, partial_out_ptr, partial_lse_ptr, pairs_ptr, offsets_ptr,
                item_offsets_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tl.load(item_segment_ptr + item),
                item, scale, first_token, num_tokens, num_slots, num_sequences, search_steps, head,
                chunk_head, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, HEAD_DIM,
                VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_SIZE, CAUSAL, ROWS, KEYS,
                TILES_PER_ITEM,
            )  # fmt: skip
    else:
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            _attend_item(
                q_ptr, k_ptr, v_ptr, partial_out_ptr, partial_lse_ptr, pairs_ptr, offsets_ptr,
                item_offsets_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tl.load(item_segment_ptr + item),
                item, scale, first_token, num_tokens, num_slots, num_sequences, search_steps, head,
                chunk_head, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, HEAD_DIM,
                VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_SIZE, CAUSAL, ROWS, KEYS,
                TILES_PER_ITEM,
            )  # fmt: skip


@triton.jit
def _load_partial(
    lse_ptrs, out_ptrs, slot, used, value_mask, HEADS_PER_PAIR: tl.constexpr, VALUE_DIM: tl.constexpr
):
    """The partial of one slot of every row: its log-sum-exp (-inf in an unused slot) and its output."""
    lse = tl.load(lse_ptrs + slot * HEADS_PER_PAIR, mask=used, other=float("-inf"))
    mask = used[:, None] & value_mask[None, :]
    out = tl.load(out_ptrs + slot * HEADS_PER_PAIR * VALUE_DIM, mask=mask, other=0.0)
    return lse, out


@kernel
def _merge(
    partial_out_ptr,
    partial_lse_ptr,
    used_ptr,
    item_offsets_ptr,
    out_ptr,
    lse_ptr,
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
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    WITH_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the slots of ROWS (token, query head) rows: out [total_q, q heads, dim], lse in natural units.

    used int32 [index heads, tokens, slots] is negative for a slot that has no partial. The slots are added
    one after another, so that unused slots at the end change no bit. WITH_SHARED adds them to what out and
    lse hold, and leaves rows without slots as they are.
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
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    value_mask = value_dims < VALUE_DIM
    used_ptrs = (
        used_ptr + tl.cast(index_head, tl.int64) * group_pairs + (chunk * chunk_tokens + tokens) * num_slots
    )
    first_pair = (chunk_head.to(tl.int64) * num_tokens + tokens) * num_slots
    lse_ptrs = partial_lse_ptr + first_pair * HEADS_PER_PAIR + heads
    out_ptrs = (
        partial_out_ptr + (first_pair * HEADS_PER_PAIR + heads)[:, None] * VALUE_DIM + value_dims[None, :]
    )
    q_heads = (first_head + chunk_head) * HEADS_PER_PAIR + heads
    places = (first_token + tokens).to(tl.int64) * NUM_Q_HEADS + q_heads
    answer_ptrs = out_ptr + places[:, None] * VALUE_DIM + value_dims[None, :]
    shared_lse = tl.full((ROWS,), float("-inf"), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
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
        shared_lse = tl.load(lse_ptr + places, mask=row_mask, other=float("-inf")) / LN_2
        acc = tl.load(answer_ptrs, mask=row_mask[:, None] & value_mask[None, :], other=0.0).to(tl.float32)
    # Not one maximum after another: Triton 3.6 cannot compile a loop of them.
    most_lse = tl.full((ROWS, 32), float("-inf"), tl.float32)
    for first_slot in range(0, num_slots, 32):
        exists = row_mask[:, None] & (first_slot + bits < num_slots)[None, :]
        marks = tl.load(used_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
        slots_lse_ptrs = lse_ptrs[:, None] + (first_slot + bits)[None, :] * HEADS_PER_PAIR
        slots_lse = tl.load(slots_lse_ptrs, mask=marks >= 0, other=float("-inf"))
        most_lse = tl.maximum(most_lse, slots_lse)
    row_max = tl.maximum(shared_lse, tl.max(most_lse, 1))
    shift = finite(row_max)
    row_sum = tl.exp2(shared_lse - shift)
    acc *= row_sum[:, None]
    for first_slot in range(0, num_slots, 32):
        exists = row_mask[:, None] & (first_slot + bits < num_slots)[None, :]
        marks = tl.load(used_ptrs[:, None] + first_slot + bits[None, :], mask=exists, other=-1)
        used = tl.sum((marks >= 0).to(tl.int32) << bits[None, :], 1)
        # Two slots at a time: what limits this kernel is how many loads are under way.
        for step in range(0, tl.minimum(num_slots - first_slot, 32), 2):
            slot = first_slot + step
            has_a = ((used >> step) & 1) != 0
            has_b = ((used >> (step + 1)) & 1) != 0
            lse_a, out_a = _load_partial(
                lse_ptrs, out_ptrs, slot, has_a, value_mask, HEADS_PER_PAIR, VALUE_DIM
            )
            lse_b, out_b = _load_partial(
                lse_ptrs, out_ptrs, slot + 1, has_b, value_mask, HEADS_PER_PAIR, VALUE_DIM
            )
            weight_a, weight_b = tl.exp2(lse_a - shift), tl.exp2(lse_b - shift)
            row_sum += weight_a
            # One rounding: so it is in the kernel for Hopper, which has to find the same bits.
            acc = tl.fma(weight_a[:, None], out_a.to(tl.float32), acc)
            row_sum += weight_b
            acc = tl.fma(weight_b[:, None], out_b.to(tl.float32), acc)
    acc *= reciprocal(row_sum)[:, None]
    tl.store(answer_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & value_mask[None, :])
    tl.store(lse_ptr + places, (row_max + tl.log2(row_sum)) * LN_2, mask=row_mask)


def attend_group(
    problem: Problem,
    plan: ForwardPlan,
    group: Group,
    workspace: tuple[Inversion, torch.Tensor, torch.Tensor],
    used: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Partials of the indexed pairs, and their merge, a chunk at a time; ``used`` as ``_merge`` has it."""
    p, (inversion, partial_out, partial_lse) = problem, workspace
    attend, merge = _kernels(p, plan, MERGE_ROWS)
    group_pairs, steps = inversion.pairs.shape[1], search_steps(p.num_sequences)
    is_mixed, scale = plan.query_tile is not None, p.softmax_scale * LOG2_E.value
    if plan.is_buffered:
        _attending_on_hopper(p, plan)[(min(multiprocessors(q.device), plan.max_items),)](
            q, k, v, partial_out, partial_lse, inversion.counts, inversion.used, inversion.pairs,
            inversion.item_offsets, inversion.items, out, lse, scale, group.first_token, group.num_tokens,
            plan.chunk_tokens, group.first_head, group.num_heads, plan.chunk_heads, p.num_slots,
            plan.segments, plan.group_chunks, plan.group_tokens, plan.max_items,
        )  # fmt: skip
        return
    programs = min(plan.max_items, mixed_programs(q.device)) if is_mixed else plan.max_items
    for c in chunks(plan, group):
        attend[programs, c.num_heads](
            q, k, v, partial_out, partial_lse, inversion.pairs, inversion.offsets, inversion.item_offsets,
            inversion.items, cu_seqlens_q, cu_seqlens_k, scale, c.first_token, c.num_tokens,
            plan.chunk_tokens, p.num_slots, p.num_sequences, steps, plan.segments, plan.group_chunks,
            group_pairs, plan.max_items, c.first_head, c.first_index_head, c.number,
        )  # fmt: skip
        merge[-(-c.num_tokens * plan.heads_per_pair // MERGE_ROWS), c.num_heads](
            partial_out, partial_lse, used, inversion.item_offsets, out, lse, c.first_token,
            c.num_tokens, plan.chunk_tokens, p.num_slots, plan.segments, plan.group_chunks, group_pairs,
            c.first_head, c.first_index_head, c.number,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _attending_on_hopper(problem: Problem, plan: ForwardPlan) -> BoundKernel:
    """The kernel of partials and their merge for Hopper alone."""
    from fsa_core.kernels import hopper_partials
    from fsa_core.kernels.hopper_tiles import exact_dims

    shared = exact_dims(attention_constants(problem, plan))
    return hopper_partials.attend_pairs.bind(
        **shared,
        **hopper_partials.constants(plan.tile, problem.num_slots),
        WITH_SHARED=plan.query_tile is not None,
    )


@lru_cache(maxsize=1024)
def _kernels(problem: Problem, plan: ForwardPlan, merge_rows: int) -> tuple[BoundKernel, BoundKernel]:
    """The kernels of partials and of their merge, with what is the same for all chunks."""
    p, is_mixed = problem, plan.query_tile is not None
    attend = _partial.bind(
        **attention_constants(p, plan), ROWS=plan.tile.rows, KEYS=plan.tile.keys,
        TILES_PER_ITEM=plan.tile.tiles_per_item, ITEM_A_PROGRAM=not is_mixed, num_warps=plan.tile.num_warps,
        num_stages=1, maxnreg=plan.tile.max_registers,
    )  # fmt: skip
    merge = _merge.bind(
        NUM_Q_HEADS=p.num_q_heads, HEADS_PER_PAIR=plan.heads_per_pair, INDEX_PER_HEAD=plan.index_per_head,
        VALUE_DIM=p.value_dim, VALUE_DIM_PADDED=padded_dim(p.value_dim), WITH_SHARED=is_mixed,
        ROWS=merge_rows, num_warps=MERGE_WARPS, num_stages=1,
    )  # fmt: skip
    return attend, merge


def new_partials(
    problem: Problem, plan: ForwardPlan, memory: Memory, kept_left: torch.Tensor | None = None
) -> tuple[Inversion, torch.Tensor, torch.Tensor]:
    """Index buffers of one group and partials of a chunk or two; every group and every chunk reuses them.

    ``kept_left`` as of ``Inversion``.
    """
    pairs = (plan.buffers, plan.chunk_heads, plan.chunk_tokens, problem.num_slots, plan.heads_per_pair)
    inversion = new_inversion(plan, problem.num_slots, memory, kept_left)
    partial_out = memory.new_empty(*pairs, problem.value_dim)
    return inversion, partial_out, memory.new_empty(*pairs, dtype=torch.float32)

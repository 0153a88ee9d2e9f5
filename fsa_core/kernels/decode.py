"""Selected attention over a paged cache: a token's slots are cut into splits, whose answers are merged.

What a step costs is reading the chosen blocks, once. No host synchronisation:

1. a program takes slots of a token under a KV head, with the query heads of the group as rows, looks up all
   their pages at once, and walks the blocks with an online softmax while the next ones are on their way;
2. a token's splits are added in order by their log-sum-exp, without atomics.

Where there are few tokens a program takes one split, and merging is a launch of its own. Where there are
enough to keep the GPU busy a program takes all splits of a row, one after the other, and merges them as they
come.
How slots are split follows from the sizes of a row alone and splits are merged alike in both, so that an
answer is bitwise the same alone and in any company, and, up to MAX_SPLITS, with unused slots behind it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors
from fsa_core.kernels.primitives import LN_2, LOG2_E, finite, reciprocal
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, power_of_two

# Four blocks of the usual 64 keys: 64 tokens of 16 such blocks under 4 heads are 1,024 programs.
SPLIT_KEYS = 256
# A token with more slots has longer splits.
MAX_SPLITS = 32
# K and V of a step. Three steps on their way, two programs a multiprocessor: what hides the memory's latency.
STEP_BYTES = 32 * 1024
STAGES = 3
# With as many rows or more a program takes all splits of one: then most multiprocessors have two, and each
# reads without a pause. 256 rows are 1.9 on an H200, where longer splits were measured to win.
ROWS_A_MULTIPROCESSOR = 1.5
# Query heads a program takes at most, of groups that are larger; each of their programs reads the blocks.
MAX_ROWS = 64
# Products of float32 are three, and take their registers.
MAX_ROWS_FLOAT32 = 16
# What a program of one warp merges: numbers of the answer.
MERGE_NUMBERS = 256
# Sequences whose starts are looked at together for a token's.
STARTS = tl.constexpr(256)


@dataclass(frozen=True, slots=True)
class Split:
    """How a token's work is cut: ``slots`` a program, ``keys`` a step, ``rows`` of a tile.

    ``parts`` programs share the query heads of a row of ids, ``heads`` each.
    """

    slots: int
    num_splits: int
    keys: int
    heads: int
    parts: int
    rows: int
    num_warps: int


# A step asks for it at every layer.
@lru_cache(maxsize=1024)
def split(problem: Problem) -> Split:
    """From what a row is, never from how many there are."""
    p = problem
    key_bytes = (padded_dim(p.head_dim) + padded_dim(p.value_dim)) * p.dtype.itemsize
    step_keys = 1 << (STEP_BYTES // key_bytes).bit_length() - 1
    slots = max(SPLIT_KEYS // p.block_size, power_of_two(-(-p.num_slots // MAX_SPLITS)))
    parts = -(-p.heads_per_pair // (MAX_ROWS_FLOAT32 if p.dtype == torch.float32 else MAX_ROWS))
    heads = -(-p.heads_per_pair // parts)
    return Split(
        slots=slots,
        num_splits=-(-p.num_slots // slots),
        keys=min(p.block_size, 64, max(step_keys, 16)),
        heads=heads,
        parts=parts,
        rows=max(16, power_of_two(heads)),
        num_warps=4 if padded_dim(p.value_dim) <= 128 else 8,
    )


@triton.jit
def _sequence_of(cu_seqlens_q_ptr, token, num_sequences):
    """The sequence of a token: how many of them end before it. No load waits for another."""
    sequence = token * 0
    for first in range(0, num_sequences, STARTS):
        place = first + tl.arange(0, STARTS)
        end = tl.load(cu_seqlens_q_ptr + 1 + place, mask=place < num_sequences, other=2147483647)
        sequence += tl.sum((end <= token).to(tl.int32), 0)
    return tl.minimum(sequence, num_sequences - 1)


@triton.jit
def _with_split(acc, row_sum, row_max, split_out, split_lse):
    """Rows of the splits so far and of one more, log-sum-exps in log2 units: what ``row_max`` and ``row_sum``
    are of scores.

    Added to no split (zeros, -inf) one comes out as it went in; one of no used slot changes no bit. What is
    fused is said, and what is not has nothing to be fused with: all kernels round alike.
    """
    new_max = tl.maximum(row_max, split_lse)
    shift = finite(new_max)
    shrink, weight = tl.exp2(row_max - shift), tl.exp2(split_lse - shift)
    weights = tl.broadcast_to(weight[:, None], split_out.shape)
    return tl.fma(weights, split_out, acc * shrink[:, None]), tl.fma(row_sum, shrink, weight), new_max


@kernel
def _attend_slots(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    page_table_ptr,
    indices_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    scale,
    num_sequences,
    num_slots,
    num_pages,
    max_pages,
    table_stride,
    ONE_TOKEN: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    TILE_HEADS_PER_KV_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_KEY: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_DIM: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_KEY: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """SPLITS splits of SLOTS slots of a token: out [splits, tokens, q heads, dim], normalised, and lse, in
    log2 units. If these are ALL splits of a row, they are merged, and lse is natural.

    Ids and pages that name nothing the token may see select nothing, so that no index can reach memory it
    should not.
    """
    token = tl.program_id(0)
    head = tl.program_id(1) // PARTS
    first_slot = tl.program_id(2) * SLOTS
    slot = tl.arange(0, ALL_SLOTS)
    index_row = tl.cast(token, tl.int64)
    if INDEX_PER_HEAD:
        index_row += head.to(tl.int64) * tl.num_programs(0)
    ids_mask = first_slot + slot < num_slots
    ids = tl.load(indices_ptr + index_row * num_slots + first_slot + slot, mask=ids_mask, other=-1)
    if ONE_TOKEN:
        sequence = token
        num_visible = tl.load(seq_lens_ptr + sequence)
    else:
        sequence = _sequence_of(cu_seqlens_q_ptr, token, num_sequences)
        # The queries behind the token come last in the sequence.
        num_behind = tl.load(cu_seqlens_q_ptr + sequence + 1) - token - 1
        num_visible = tl.load(seq_lens_ptr + sequence) - num_behind
    column = ids // (PAGE_SIZE // BLOCK_SIZE)
    valid = (ids >= 0) & (ids < tl.cdiv(num_visible, BLOCK_SIZE)) & (column < max_pages)
    pages_ptr = page_table_ptr + sequence.to(tl.int64) * table_stride
    page = tl.load(pages_ptr + column, mask=valid, other=-1)
    valid &= (page >= 0) & (page < num_pages)
    page = tl.where(valid, page, 0)
    # Of an unused slot no key comes before the last that the token sees.
    first_keys = tl.where(valid, ids * BLOCK_SIZE, num_visible)
    num_used = tl.max(tl.where(valid, slot + 1, 0), 0)

    row = tl.arange(0, ROWS)
    head_in_pair = tl.program_id(1) % PARTS * HEADS + row
    row_mask = (row < HEADS) & (head_in_pair < HEADS_PER_PAIR)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    value_mask = value_dims < VALUE_DIM
    places = tl.cast(token, tl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR + head_in_pair
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)

    # Where each number of a step lies from its first: the same for every step.
    key = tl.arange(0, KEYS)
    k_offsets = (key.to(tl.int64) * K_KEY)[None, :] + (dims.to(tl.int64) * K_DIM)[:, None]
    v_offsets = (key.to(tl.int64) * V_KEY)[:, None] + (value_dims.to(tl.int64) * V_DIM)[None, :]
    kv_head = (head // TILE_HEADS_PER_KV_HEAD).to(tl.int64)
    k_ptr += kv_head * K_HEAD
    v_ptr += kv_head * V_HEAD
    places += tl.program_id(2) * (tl.num_programs(0).to(tl.int64) * NUM_Q_HEADS)
    steps: tl.constexpr = BLOCK_SIZE // KEYS
    num_steps = num_used * steps
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
    # Those of the splits before.
    all_max, all_sum, all_acc = row_max, row_sum, acc
    for step in tl.range(0, num_steps, num_stages=STAGES):
        here = slot == step // steps
        first_key = tl.sum(tl.where(here, first_keys, 0), 0) + step % steps * KEYS
        of_page = tl.sum(tl.where(here, page, 0), 0).to(tl.int64)
        in_page = (first_key % PAGE_SIZE).to(tl.int64)
        seen = key < num_visible - first_key
        k_ptrs = k_ptr + (of_page * K_PAGE + in_page * K_KEY) + k_offsets
        k = tl.load(k_ptrs, mask=seen[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = finite(new_max)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v_ptrs = v_ptr + (of_page * V_PAGE + in_page * V_KEY) + v_offsets
        v = tl.load(v_ptrs, mask=seen[:, None] & value_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        row_max = new_max
        if SPLITS > 1:
            # The split's last step: the next one begins anew.
            is_last = ((step + 1) % (SLOTS * steps) == 0) | (step + 1 == num_steps)
            more_acc, more_sum, more_max = _with_split(
                all_acc, all_sum, all_max, acc * reciprocal(row_sum)[:, None], row_max + tl.log2(row_sum)
            )
            all_acc = tl.where(is_last, more_acc, all_acc)
            all_sum = tl.where(is_last, more_sum, all_sum)
            all_max = tl.where(is_last, more_max, all_max)
            row_max = tl.where(is_last, float("-inf"), row_max)
            row_sum = tl.where(is_last, 0.0, row_sum)
            acc = tl.where(is_last, 0.0, acc)
    if SPLITS > 1:
        row_max, row_sum, acc = all_max, all_sum, all_acc
    lse = row_max + tl.log2(row_sum)
    if ALL:
        lse *= LN_2
    acc *= reciprocal(row_sum)[:, None]
    numbers = places[:, None] * VALUE_DIM + value_dims[None, :]
    mask = row_mask[:, None] & value_mask[None, :]
    tl.store(out_ptr + numbers, acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + places, lse, mask=row_mask)


@kernel
def _merge_splits(
    split_out_ptr,
    split_lse_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the splits of ROWS (token, query head) rows, whose log-sum-exps are in log2 units."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    mask = row_mask[:, None] & (value_dims < VALUE_DIM)[None, :]
    places = rows[:, None] * VALUE_DIM + value_dims[None, :]
    split_rows = tl.cast(num_rows, tl.int64)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
    # Unrolled: no load waits for another.
    for split in tl.static_range(SPLITS):
        lse = tl.load(split_lse_ptr + split * split_rows + rows, mask=row_mask, other=float("-inf"))
        out = tl.load(split_out_ptr + split * split_rows * VALUE_DIM + places, mask=mask, other=0.0)
        acc, row_sum, row_max = _with_split(acc, row_sum, row_max, out, lse)
    out = acc * reciprocal(row_sum)[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=row_mask)


def paged_selected_attention_forward(
    problem: Problem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step over a paged cache; shapes as in ``fsa_core.decode``, q, block_indices and seq_lens contiguous.

    Beside the answer it takes ``split(problem).num_splits`` times that in float32, if there is more than one
    and too few rows for a program to take all of one.
    """
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    starts = () if cu_seqlens_q is None else (cu_seqlens_q.contiguous(),)
    tensors = (q, k_cache, v_cache, page_table, block_indices, seq_lens, *starts)
    cache = _Cache(k_cache.shape[0], k_cache.shape[1], k_cache.stride(), v_cache.stride())
    out, lse = _replayed(tensors, problem, cache, page_table.shape[1], page_table.stride(0))
    return out, lse


@dataclass(frozen=True, slots=True)
class _Cache:
    """The sizes of a paged cache; strides by page, key, head and dim."""

    num_pages: int
    page_size: int
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]


def _forward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    cache: _Cache,
    max_pages: int,
    page_table_stride: int,
) -> None:
    """Arguments and answers of ``paged_selected_attention_forward``, cu_seqlens_q last if there are any."""
    p, cut = problem, split(problem)
    q, k_cache, v_cache, page_table, block_indices, seq_lens, *starts = tensors
    shape = (p.num_q_tokens, p.num_q_heads, p.value_dim)
    out, lse = memory.answer(*shape), memory.answer(*shape[:2], dtype=torch.float32)
    if p.num_q_tokens == 0:
        return
    num_rows = max(p.index_heads, p.num_kv_heads) * cut.parts
    is_busy = p.num_q_tokens * num_rows >= ROWS_A_MULTIPROCESSOR * multiprocessors(q.device)
    at_once = cut.num_splits if is_busy else 1
    is_merged = cut.num_splits > at_once
    split_out, split_lse = out, lse
    if is_merged:
        split_out = memory.new_empty(cut.num_splits, *shape, dtype=torch.float32)
        split_lse = memory.new_empty(cut.num_splits, *shape[:2], dtype=torch.float32)
    attend, merge = _kernels(p, cut, cache, at_once, one_token=not starts)
    attend[p.num_q_tokens, num_rows, cut.num_splits // at_once](
        q, k_cache, v_cache, split_out, split_lse, page_table, block_indices, seq_lens,
        starts[0] if starts else seq_lens, p.softmax_scale * LOG2_E.value, p.num_sequences, p.num_slots,
        cache.num_pages, max_pages, page_table_stride,
    )  # fmt: skip
    if is_merged:
        num_rows, rows = p.num_q_tokens * p.num_q_heads, _merged_rows(p)
        merge[(-(-num_rows // rows),)](split_out, split_lse, out, lse, num_rows)


_replayed = Replayed(_forward)


@lru_cache(maxsize=1024)
def _kernels(
    problem: Problem, cut: Split, cache: _Cache, splits_at_once: int, *, one_token: bool
) -> tuple[BoundKernel, BoundKernel]:
    """Both kernels for a cache. Its strides are constants, which tells that rows begin at whole 16 bytes."""
    p, num_units = problem, max(problem.index_heads, problem.num_kv_heads)
    of_values = {"VALUE_DIM": p.value_dim, "VALUE_DIM_PADDED": padded_dim(p.value_dim)}
    names = ("PAGE", "KEY", "HEAD", "DIM")
    strides = {f"K_{name}": stride for name, stride in zip(names, cache.k_strides, strict=True)}
    strides |= {f"V_{name}": stride for name, stride in zip(names, cache.v_strides, strict=True)}
    attend = _attend_slots.bind(
        **of_values, **strides, ONE_TOKEN=one_token, INDEX_PER_HEAD=p.index_heads > 1,
        NUM_Q_HEADS=p.num_q_heads, HEADS_PER_PAIR=p.heads_per_pair,
        TILE_HEADS_PER_KV_HEAD=num_units // p.num_kv_heads, HEADS=cut.heads, PARTS=cut.parts,
        HEAD_DIM=p.head_dim, HEAD_DIM_PADDED=padded_dim(p.head_dim), BLOCK_SIZE=p.block_size,
        PAGE_SIZE=cache.page_size, SLOTS=cut.slots, SPLITS=splits_at_once,
        ALL=splits_at_once == cut.num_splits, ALL_SLOTS=power_of_two(cut.slots * splits_at_once),
        ROWS=cut.rows, KEYS=cut.keys, STAGES=STAGES, num_warps=cut.num_warps,
    )  # fmt: skip
    merge = _merge_splits.bind(**of_values, SPLITS=cut.num_splits, ROWS=_merged_rows(p), num_warps=1)
    return attend, merge


def _merged_rows(problem: Problem) -> int:
    """Rows that a program of the merge takes."""
    return max(MERGE_NUMBERS // padded_dim(problem.value_dim), 1)

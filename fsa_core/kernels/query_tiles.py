"""Blocks that neighbouring tokens share: attended query tile by query tile, in registers, without partials.

A tile is a few consecutive tokens of one sequence with all query heads of their index head. Two launches:

1. agree: list the blocks that enough of a tile's tokens chose, each with a mask of those tokens, and hand on
   what is left of block_indices. Where a tile's tokens share a row of indices, the list is that row;
2. attend: walk a tile's list with an online softmax, under the masks.

Tiles are cut from the start of each sequence and see only their own tokens, so an answer is bitwise the same
alone and in any company.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors, sorting_warps
from fsa_core.kernels.primitives import (
    LOG2_E,
    find_segment_sequence,
    finite,
    first_segment,
    natural_lse,
    reciprocal,
)
from fsa_core.kernels.replay import Memory
from fsa_core.plan import (
    FEW_LEFT,
    MAX_REGISTERS,
    ForwardPlan,
    Group,
    QueryTile,
    padded_dim,
    power_of_two,
    search_steps,
)
from fsa_core.problem import Problem

# What tiles leave may be nothing, and a program that finds no work item takes its time, too.
MIXED_PROGRAMS_PER_MULTIPROCESSOR = 8
# Of a thread where a warp sorts a tile: more, and too few tiles are on a multiprocessor at once.
MAX_SORTING_REGISTERS = 128


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the tiles of a group of tokens share, and what is left.

    blocks int32, masks int64 [index heads, tiles, max_shared]: block ids, those that every token of the tile
    may see whole before the others, and which of the tile's tokens chose each (bit t: the t-th). counts int32
    [index heads, tiles, 2]: how many of them are seen whole, and how many there are.
    leftover int32 [index heads, tokens, slots]: block_indices without the shared ones, which are -1.
    """

    blocks: torch.Tensor
    masks: torch.Tensor
    counts: torch.Tensor
    leftover: torch.Tensor


def mixed_programs(device: torch.device) -> int:
    """How many programs take the work items of what a chunk's tiles leave in turn."""
    return MIXED_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)


@triton.jit
def _join(block_a, mask_a, count_a, block_b, mask_b, count_b):
    """Runs of one block, from the left: the union of their masks and how many they are."""
    same = block_a == block_b
    return block_b, tl.where(same, mask_a | mask_b, mask_b), tl.where(same, count_a + count_b, count_b)


@triton.jit
def _spread(block_a, count_a, block_b, count_b):
    """Runs of one block, from the right: the count at their end."""
    return block_b, tl.where(block_a == block_b, tl.maximum(count_a, count_b), count_b)


@triton.jit
def tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS: tl.constexpr):
    """A tile's sequence, its first packed token (not before the end if there is no tile), and that end."""
    sequence = find_segment_sequence(cu_seqlens_q_ptr, tile, num_sequences, search_steps, TOKENS)
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    first = q_start + (tile - first_segment(cu_seqlens_q_ptr, sequence, TOKENS)) * TOKENS
    return sequence, first, tl.load(cu_seqlens_q_ptr + sequence + 1)


@triton.jit
def _tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr):
    """The blocks of a tile's sequence, and the keys that its first token sees, as all others do."""
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence)
    num_seen = tl.minimum(first + k_length - q_end + 1, k_length) if CAUSAL else k_length
    return (k_length + BLOCK_SIZE - 1) // BLOCK_SIZE, num_seen


@kernel
def _agree(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    leftover_ptr,
    first_token,
    num_tokens,
    head_stride,
    leftover_stride,
    num_slots,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_index_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LOG_TOKENS: tl.constexpr,
    LOG_SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    FEW_LEFT: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    WITH_LEFTOVER: tl.constexpr,
):
    """Sorts a tile's (block, token, slot) triples, so that the tokens that chose a block are a run."""
    tile = first_tile + tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    tile_place = head * num_tiles + tl.program_id(0)
    if first >= q_end:
        tl.store(counts_ptr + tile_place * 2, 0)
        tl.store(counts_ptr + tile_place * 2 + 1, 0)
        return
    num_blocks, num_seen = _tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    size: tl.constexpr = 1 << (LOG_TOKENS + LOG_SLOTS)
    place = tl.arange(0, size)
    token, slot = place >> LOG_SLOTS, place & ((1 << LOG_SLOTS) - 1)
    inside = (token < TOKENS) & (first + token < q_end) & (slot < num_slots)
    # All that the tile has lies at small offsets from its first.
    first_id = first.to(tl.int64) * num_slots
    id_place = token * num_slots + slot
    indices_ptr += (first_index_head + head) * head_stride + first_id
    ids = tl.load(indices_ptr + id_place, mask=inside, other=-1)
    # Ids that name no block of the sequence select nothing.
    valid = inside & (ids >= 0) & (ids < num_blocks)
    key = tl.sort(tl.where(valid, (ids << (LOG_TOKENS + LOG_SLOTS)) | place, 2147483647))
    exists = key != 2147483647
    block, place_of = key >> (LOG_TOKENS + LOG_SLOTS), key & (size - 1)
    token_of, slot_of = place_of >> LOG_SLOTS, place_of & ((1 << LOG_SLOTS) - 1)
    # What is scanned takes registers, and moves between threads word by word.
    mask_dtype: tl.constexpr = tl.uint32 if TOKENS <= 32 else tl.uint64
    bit = tl.where(exists, tl.full((size,), 1, mask_dtype) << token_of.to(mask_dtype), 0)
    _, mask, count = tl.associative_scan((block, bit, exists.to(tl.int32)), 0, _join)
    _, total = tl.associative_scan((block, count), 0, _spread, reverse=True)
    is_shared = exists & (total >= MIN_TOKENS)
    # A few partials cost more than a few blocks that hardly any of the tokens chose.
    num_left = tl.sum((exists & ~is_shared).to(tl.int32), 0)
    all_shared = num_left * FEW_LEFT < tl.sum(exists.to(tl.int32), 0)
    is_shared |= exists & all_shared
    is_last = is_shared & (count == total)
    list_place = tl.cumsum(is_last.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + tile_place * MAX_SHARED + list_place, block, mask=is_last)
    tl.store(masks_ptr + tile_place * MAX_SHARED + list_place, mask.to(tl.int64), mask=is_last)
    is_whole = is_last & ((block + 1) * BLOCK_SIZE <= num_seen)
    tl.store(counts_ptr + tile_place * 2, tl.sum(is_whole.to(tl.int32), 0))
    tl.store(counts_ptr + tile_place * 2 + 1, tl.sum(is_last.to(tl.int32), 0))
    if WITH_LEFTOVER:
        # A tile at the border of a group of tokens is seen by both groups; each keeps its own tokens.
        first -= first_token
        leftover_ptr += head * leftover_stride + first.to(tl.int64) * num_slots
        here = inside & (first + token >= 0) & (first + token < num_tokens)
        nothing = tl.full((size,), -1, tl.int32)
        if all_shared:
            tl.store(leftover_ptr + id_place, nothing, mask=here)
        else:
            tl.store(leftover_ptr + id_place, nothing, mask=here & ~valid)
            here = exists & (first + token_of >= 0) & (first + token_of < num_tokens)
            left = tl.where(is_shared, -1, block)
            tl.store(leftover_ptr + token_of * num_slots + slot_of, left, mask=here)


@kernel
def _list_rows(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_index_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MAX_SHARED: tl.constexpr,
):
    """The list of a tile whose tokens share a row: that of its last token, which sees most, slot by slot."""
    tile = first_tile + tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    tile_place = head * num_tiles + tl.program_id(0)
    if first >= q_end:
        tl.store(counts_ptr + tile_place * 2, 0)
        tl.store(counts_ptr + tile_place * 2 + 1, 0)
        return
    num_blocks, num_seen = _tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE, CAUSAL)
    slot = tl.arange(0, SLOTS)
    last = tl.minimum(first + TOKENS, q_end) - 1
    row_ptr = indices_ptr + (first_index_head + head) * head_stride + last.to(tl.int64) * num_slots
    ids = tl.load(row_ptr + slot, mask=slot < num_slots, other=-1)
    # Ids that name no block of the sequence select nothing.
    exists = (ids >= 0) & (ids < num_blocks)
    is_whole = exists & ((ids + 1) * BLOCK_SIZE <= num_seen)
    num_whole = tl.sum(is_whole.to(tl.int32), 0)
    # How many there are up to a slot, it included.
    whole = tl.cumsum(is_whole.to(tl.int32), 0)
    others = tl.cumsum(exists.to(tl.int32), 0) - whole
    list_place = tile_place * MAX_SHARED + tl.where(is_whole, whole, num_whole + others) - 1
    tl.store(blocks_ptr + list_place, ids, mask=exists)
    tl.store(masks_ptr + list_place, tl.full((SLOTS,), -1, tl.int64), mask=exists)
    tl.store(counts_ptr + tile_place * 2, num_whole)
    tl.store(counts_ptr + tile_place * 2 + 1, tl.sum(exists.to(tl.int32), 0))


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


def new_agreement(
    problem: Problem, plan: ForwardPlan, tile: QueryTile, memory: torch.Tensor | Memory
) -> Agreement:
    """Buffers of one group of tokens, as ``memory`` makes them."""
    heads = plan.group_heads if plan.index_per_head else 1
    lists = (heads, plan.group_tiles, tile.max_shared)
    leftover_tokens = plan.group_tokens if plan.has_leftover else 0
    return Agreement(
        blocks=memory.new_empty(*lists, dtype=torch.int32),
        masks=memory.new_empty(*lists, dtype=torch.int64),
        counts=memory.new_empty(*lists[:2], 2, dtype=torch.int32),
        leftover=memory.new_empty(heads, leftover_tokens, problem.num_slots, dtype=torch.int32),
    )


def agree(
    agreement: Agreement,
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    """Fills ``agreement`` for a group's tokens; tensors as in ``selected_attention_forward``."""
    p, steps = problem, search_steps(problem.num_sequences)
    first_tile, num_tiles = tiles_of(p, tile, group)
    if tile.is_row:
        _listing(p, tile)[num_tiles, group.num_index_heads](
            block_indices, cu_seqlens_q, cu_seqlens_k, agreement.blocks, agreement.masks, agreement.counts,
            block_indices.stride(0), p.num_slots, p.num_sequences, steps, first_tile,
            agreement.counts.shape[1], group.first_index_head,
        )  # fmt: skip
        return
    num_warps = sorting_warps(block_indices.device, num_tiles * group.num_index_heads)
    _agreeing(p, tile, plan.has_leftover, num_warps)[num_tiles, group.num_index_heads](
        block_indices, cu_seqlens_q, cu_seqlens_k, agreement.blocks, agreement.masks, agreement.counts,
        agreement.leftover, group.first_token, group.num_tokens, block_indices.stride(0),
        agreement.leftover.stride(0), p.num_slots, p.num_sequences, steps, first_tile,
        agreement.counts.shape[1], group.first_index_head,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _listing(problem: Problem, tile: QueryTile) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _list_rows.bind(
        BLOCK_SIZE=problem.block_size, TOKENS=tile.tokens, SLOTS=power_of_two(problem.num_slots),
        CAUSAL=problem.causal, MAX_SHARED=tile.max_shared,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _agreeing(problem: Problem, tile: QueryTile, with_leftover: bool, num_warps: int) -> BoundKernel:
    """The kernel with what is the same for all groups."""
    return _agree.bind(
        BLOCK_SIZE=problem.block_size, TOKENS=tile.tokens, LOG_TOKENS=(tile.tokens - 1).bit_length(),
        LOG_SLOTS=(problem.num_slots - 1).bit_length(), CAUSAL=problem.causal, MIN_TOKENS=tile.min_tokens,
        FEW_LEFT=FEW_LEFT, MAX_SHARED=tile.max_shared, WITH_LEFTOVER=with_leftover, num_warps=num_warps,
        maxnreg=MAX_SORTING_REGISTERS if num_warps == 1 else MAX_REGISTERS,
    )  # fmt: skip


def tiles_of(problem: Problem, tile: QueryTile, group: Group) -> tuple[int, int]:
    """The first tile that may meet a group's tokens, and how many may: known without reading cu_seqlens."""
    first_tile = max(group.first_token // tile.tokens - 1, 0)
    last_tile = (group.first_token + group.num_tokens - 1) // tile.tokens + problem.num_sequences
    return first_tile, last_tile - first_tile


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
    first_tile, num_tiles = tiles_of(p, tile, group)
    arguments = (
        q, k, v, out, lse, agreement.blocks, agreement.masks, agreement.counts, cu_seqlens_q, cu_seqlens_k,
        p.softmax_scale * LOG2_E.value, group.first_token, group.num_tokens, p.num_sequences, steps,
        first_tile, agreement.counts.shape[1], group.first_head,
    )  # fmt: skip
    attend = _attending_on_hopper(p, plan, tile) if hopper.runs_on(q.device) else None
    if attend is None:
        _attending(p, plan, tile)[num_tiles, group.num_heads](*arguments)
    else:
        programs = min(multiprocessors(q.device), num_tiles * group.num_heads)
        attend[(programs,)](*arguments, num_tiles, group.num_heads)


@lru_cache(maxsize=1024)
def _attending_on_hopper(problem: Problem, plan: ForwardPlan, tile: QueryTile) -> BoundKernel | None:
    """The kernel for Hopper alone, if it takes the tile."""
    from fsa_core.kernels import hopper_query_tiles
    from fsa_core.kernels.hopper_tiles import exact_dims

    if not hopper_query_tiles.takes(problem, tile):
        return None
    shared = exact_dims(attention_constants(problem, plan))
    return hopper_query_tiles.attend.bind(
        **shared, TOKENS=tile.tokens, MAX_SHARED=tile.max_shared, num_warps=4
    )


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

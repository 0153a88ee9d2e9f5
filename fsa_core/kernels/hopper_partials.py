"""Partials of selected attention and their merge, for Hopper: ``forward._partial`` and ``_merge`` in Gluon.

One launch for all chunks of a group: its programs attend a chunk's items, meet, merge the chunk's rows, and
meet again before the next chunk's partials go where these were. Where query tiles left nothing, it ends.

A row's numbers depend on nothing but the row, and slots are added in their order: the bits are the twins'.
"""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsa_core.kernels.hopper_chunks import (
    MERGED_ROWS,
    any_items,
    chunk_of,
    chunks_of,
    meet,
    merged_tiles,
    new_meeting,
    used_slots,
)
from fsa_core.kernels.hopper_items import (
    ROWS_LAYOUT,
    copy_items,
    head_index,
    hides,
    item_of,
    load_item,
    most_items,
    new_items,
    places_of,
    store_places,
    visible,
)
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, share_of
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LN_2
from fsa_core.plan import TileShape

# Tiles of q in shared memory, by the keys of a block: as many as there is room for beside two blocks.
STAGES = {128: 4}
MOST_STAGES = 6
# Of a multiplying and of a copying thread; those of the first multiplying group are what is left of 504.
REGISTERS, COPYING_REGISTERS = 208, 88


@gluon.jit
def _attend_items(
    answers,
    index,
    sequences,
    chunk,
    tokens,
    num_heads,
    blocks,
    tiles,
    out_tiles,
    scale,
    n,
    block,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every second tile of a chunk's items: its rows' outputs, normalised, and log-sum-exps in log2 units.

    ``n`` tiles and ``block`` items were before them; returns how many are.
    """
    out_ptr, lse_ptr = answers
    first_token, num_tokens, num_slots = tokens
    k_blocks, v_blocks, keys_ready, keys_free = blocks
    q_tiles, pair_tiles, ready, free = tiles
    STAGES: gl.constexpr = q_tiles.shape[0]
    PAIRS: gl.constexpr = SIDE // HEADS_PER_PAIR
    dtype: gl.constexpr = q_tiles.dtype
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    zeros = gl.zeros([SIDE, BLOCK_SIZE], gl.float32, scores_layout)
    no_out = gl.zeros([SIDE, VALUE_DIM], gl.float32, out_layout)
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, scores_layout))
    out_rows = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT))
    for head in range(num_heads):
        lists, _pairs, num_items = head_index(index, chunk, head, INDEX_PER_HEAD)
        head_place = head * num_tokens
        if gl.program_id(0) < num_items:
            loaded = load_item(lists, sequences, gl.program_id(0), num_items, BLOCK_SIZE)
            for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
                _first, num_pairs, block_start, _start, k_length, q_shift = item_of(
                    loaded, item, BLOCK_SIZE, PAIRS_PER_ITEM
                )
                loaded = load_item(lists, sequences, item + gl.num_programs(0), num_items, BLOCK_SIZE)
                num_tiles = (num_pairs + PAIRS - 1) // PAIRS
                first_position = first_token + q_shift
                is_cut = hides(block_start, first_position, k_length, BLOCK_SIZE, CAUSAL)
                mbarrier.wait(keys_ready.index(block % 2), (block // 2) & 1)
                k, v = k_blocks.index(block % 2).permute([1, 0]), v_blocks.index(block % 2)
                for tile in range((n + GROUP) % 2, num_tiles, 2):
                    stage = (n + tile) % STAGES
                    mbarrier.wait(ready.index(stage), ((n + tile) // STAGES) & 1)
                    fence_async_shared()
                    scores = warpgroup_mma(q_tiles.index(stage), k, zeros, use_acc=False, is_async=True)
                    pairs = pair_tiles.index(stage).load(rows.type.layout)
                    out_pairs = pair_tiles.index(stage).load(out_rows.type.layout)
                    scores = warpgroup_mma_wait(0, deps=[scores])
                    mbarrier.arrive(free.index(stage), count=1)
                    if is_cut:
                        seen = visible(pairs, block_start, first_position, k_length, BLOCK_SIZE, CAUSAL)
                        scores = gl.where(seen, scores, float("-inf"))
                    row_max = gl.max(scores, 1)
                    finite = gl.where(row_max == float("-inf"), 0.0, row_max)
                    weights = gl.exp2(scores * scale - (finite * scale)[:, None])
                    row_sum = gl.sum(weights, 1)
                    left = gl.convert_layout(weights.to(dtype), weights_layout)
                    out = warpgroup_mma(left, v, no_out, use_acc=False, is_async=True)
                    num_left = num_pairs - tile * PAIRS
                    pair = rows // HEADS_PER_PAIR
                    lse_ptrs = lse_ptr + places_of(pairs, rows, head_place, num_slots, HEADS_PER_PAIR)
                    lse = row_max * scale + gl.log2(row_sum)
                    gl.store(lse_ptrs, lse, mask=(pair < PAIRS) & (pair < num_left))
                    share = gl.convert_layout(share_of(row_sum), gl.SliceLayout(1, out_layout))
                    places = places_of(out_pairs, out_rows, head_place, num_slots, HEADS_PER_PAIR)
                    out = warpgroup_mma_wait(0, deps=[out]) * share[:, None]
                    store_places(out_ptr, out, out_tiles.index(GROUP), places, num_left, HEADS_PER_PAIR)
                mbarrier.arrive(keys_free.index(block % 2), count=1)
                n += num_tiles
                block += 1
    return n, block


@gluon.jit
def _load_partial(lse_ptrs, out_ptrs, slot, used, HEADS_PER_PAIR: gl.constexpr, VALUE_DIM: gl.constexpr):
    """The partial of one slot of every row: its log-sum-exp (-inf in an unused slot) and its output."""
    # What lay here before the programs met must not be found again.
    lse = gl.load(lse_ptrs + slot * HEADS_PER_PAIR, mask=used, other=float("-inf"), cache_modifier=".cg")
    slot_ptrs = out_ptrs + slot * (HEADS_PER_PAIR * VALUE_DIM)
    return lse, gl.load(slot_ptrs, mask=used[:, None], other=0.0, cache_modifier=".cg")


@gluon.jit
def _add_partial(row_max, row_sum, acc, partial):
    """Online softmax over slots, in log2 units."""
    lse, out = partial
    new_max = gl.maximum(row_max, lse)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = gl.exp2(row_max - shift)
    weight = gl.exp2(lse - shift)
    return new_max, row_sum * shrink + weight, acc * shrink[:, None] + weight[:, None] * out.to(gl.float32)


@gluon.jit
def _merge_rows(
    partials,
    answers,
    used_ptr,
    chunk,
    tokens,
    heads,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every so many-th tile of a chunk's rows: what ``forward._merge`` makes of it.

    Pointers to the answers are to those of the chunk's first token and head.
    """
    partial_out_ptr, partial_lse_ptr = partials
    out_ptr, lse_ptr = answers
    first_index_head, _chunks, number, _segments, group_pairs, chunk_pairs, _items = chunk
    _first, num_tokens, num_slots = tokens
    _head, num_heads = heads
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    dims = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, layout))
    tiles_of_head, num_tiles = merged_tiles(num_tokens, num_heads, HEADS_PER_PAIR)
    for tile in range(gl.program_id(0) * 2 + GROUP, num_tiles, gl.num_programs(0) * 2):
        head = tile // tiles_of_head
        rows = tile % tiles_of_head * MERGED_ROWS + gl.arange(0, MERGED_ROWS, row_layout)
        token = rows // HEADS_PER_PAIR
        exists = token < num_tokens
        head_in_pair = rows % HEADS_PER_PAIR
        index_head = first_index_head + head if INDEX_PER_HEAD else 0
        chunk_used_ptr = used_ptr + (index_head * group_pairs.to(gl.int64) + number * chunk_pairs)
        first_place = (head * num_tokens + token) * num_slots * HEADS_PER_PAIR + head_in_pair
        lse_ptrs = partial_lse_ptr + first_place
        out_ptrs = partial_out_ptr + ((first_place * VALUE_DIM)[:, None] + dims[None, :])
        place = token * NUM_Q_HEADS + (head * HEADS_PER_PAIR + head_in_pair)
        answer_ptrs = out_ptr + ((place * VALUE_DIM)[:, None] + dims[None, :])
        used = used_slots(chunk_used_ptr, token, exists, 0, num_slots, row_layout)
        if WITH_SHARED:
            any_used = used
            for first_slot in range(32, num_slots, 32):
                any_used |= used_slots(chunk_used_ptr, token, exists, first_slot, num_slots, row_layout)
            exists &= any_used != 0
            row_max = gl.load(lse_ptr + place, mask=exists, other=float("-inf")) / LN_2
            row_sum = gl.where(row_max == float("-inf"), 0.0, 1.0)
            acc = gl.load(answer_ptrs, mask=exists[:, None], other=0.0).to(gl.float32)
        else:
            row_max = gl.full([MERGED_ROWS], float("-inf"), gl.float32, row_layout)
            row_sum = gl.zeros([MERGED_ROWS], gl.float32, row_layout)
            acc = gl.zeros([MERGED_ROWS, VALUE_DIM], gl.float32, layout)
        for first_slot in range(0, num_slots, 32):
            if first_slot > 0:
                used = used_slots(chunk_used_ptr, token, exists, first_slot, num_slots, row_layout)
            # Four slots at a time: what limits this is how many loads are under way.
            for step in range(0, gl.minimum(num_slots - first_slot, 32), 4):
                bits = used >> step
                slot = first_slot + step
                a = _load_partial(lse_ptrs, out_ptrs, slot, (bits & 1) != 0, HEADS_PER_PAIR, VALUE_DIM)
                b = _load_partial(lse_ptrs, out_ptrs, slot + 1, (bits & 2) != 0, HEADS_PER_PAIR, VALUE_DIM)
                c = _load_partial(lse_ptrs, out_ptrs, slot + 2, (bits & 4) != 0, HEADS_PER_PAIR, VALUE_DIM)
                d = _load_partial(lse_ptrs, out_ptrs, slot + 3, (bits & 8) != 0, HEADS_PER_PAIR, VALUE_DIM)
                row_max, row_sum, acc = _add_partial(row_max, row_sum, acc, a)
                row_max, row_sum, acc = _add_partial(row_max, row_sum, acc, b)
                row_max, row_sum, acc = _add_partial(row_max, row_sum, acc, c)
                row_max, row_sum, acc = _add_partial(row_max, row_sum, acc, d)
        acc *= share_of(row_sum)[:, None]
        gl.store(answer_ptrs, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])
        gl.store(lse_ptr + place, (row_max + gl.log2(row_sum)) * LN_2, mask=exists)


@gluon.jit
def _attend_chunks(
    partials,
    answers,
    used_ptr,
    counter_ptr,
    index,
    sequences,
    schedule,
    meeting,
    blocks,
    tiles,
    out_tiles,
    scale,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A chunk after the other: every second tile of its items, and when all programs have attended theirs,
    every second tile of rows that are merged.
    """
    out_ptr, lse_ptr = answers
    # Tiles, items and meetings before.
    n = 0
    block = 0
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        first_token, _num_tokens, _slots = tokens
        first_head, num_heads = heads
        has_items = most_items(index, chunk, num_heads, INDEX_PER_HEAD) > 0
        if has_items or not WITH_SHARED:
            n, block = _attend_items(
                partials, index, sequences, chunk, tokens, num_heads, blocks, tiles, out_tiles, scale, n,
                block, HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, PAIRS_PER_ITEM, GROUP,
            )  # fmt: skip
            meet(meeting, counter_ptr, met, GROUP)
            row = first_token.to(gl.int64) * NUM_Q_HEADS + first_head * HEADS_PER_PAIR
            of_chunk = (out_ptr + row * VALUE_DIM, lse_ptr + row)
            _merge_rows(
                partials, of_chunk, used_ptr, chunk, tokens, heads, NUM_Q_HEADS, HEADS_PER_PAIR,
                INDEX_PER_HEAD, VALUE_DIM, WITH_SHARED, GROUP,
            )  # fmt: skip
            meet(meeting, counter_ptr, met + 1, GROUP)
            met += 2


@gluon.jit
def _copy_chunks(
    pointers,
    index,
    sequences,
    schedule,
    first_head,
    blocks,
    tiles,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
):
    """What the items of every chunk need, also while those before are being merged."""
    q_ptr, k_ptr, v_ptr = pointers
    n = 0
    block = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        first_token, _num_tokens, _slots = tokens
        chunk_head, num_heads = heads
        row = first_token.to(gl.int64) * NUM_Q_HEADS + chunk_head * HEADS_PER_PAIR
        of_chunk = (q_ptr + row * HEAD_DIM, k_ptr, v_ptr, q_ptr, q_ptr, q_ptr)
        n, block = copy_items(
            of_chunk, index, sequences, chunk, (first_head + chunk_head, num_heads), blocks, tiles, (), 0, n,
            block, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD,
            HEAD_DIM, VALUE_DIM, BLOCK_SIZE, PAIRS_PER_ITEM, gl.constexpr(False),
        )  # fmt: skip


@partial(kernel, jit=gluon.jit)
def attend_pairs(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    counts_ptr,
    used_ptr,
    pairs_ptr,
    offsets_ptr,
    item_offsets_ptr,
    item_segment_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    scale,
    first_token,
    num_tokens,
    chunk_tokens,
    first_head,
    num_heads,
    chunk_heads,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    group_pairs,
    max_items,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
):
    """All chunks of a group: tokens and heads from the first on. Arguments as of ``_partial`` and ``_merge``.

    All programs have to run at once. The second of ``counts``, which nothing else uses, is 0 or -2^31 before
    and afterwards.
    """
    counter_ptr = counts_ptr + 1
    index = (pairs_ptr, offsets_ptr, item_offsets_ptr, item_segment_ptr)
    # Before what a program of three groups takes to begin.
    if WITH_SHARED:  # noqa: SIM102 - the first condition is known when the kernel is compiled
        if not any_items(item_offsets_ptr, num_chunks * (num_heads if INDEX_PER_HEAD else 1), num_segments):
            return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    blocks, tiles = new_items(dtype, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, STAGES)
    meeting = new_meeting()
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], out_layout)
    first_row = first_head * HEADS_PER_PAIR
    sequences = (cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_sequences, search_steps)
    schedule = (
        first_token, num_tokens, chunk_tokens, num_heads, chunk_heads, num_chunks, num_segments, group_pairs,
        num_slots, max_items,
    )  # fmt: skip
    pointers = (q_ptr + first_row * HEAD_DIM, k_ptr, v_ptr)
    partials = (partial_out_ptr, partial_lse_ptr)
    answers = (out_ptr + first_row * VALUE_DIM, lse_ptr + first_row)
    gl.warp_specialize(
        [
            (_attend_chunks, (
                partials, answers, used_ptr, counter_ptr, index, sequences, schedule, meeting, blocks, tiles,
                out_tiles, scale, NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL,
                PAIRS_PER_ITEM, WITH_SHARED, gl.constexpr(0),
            )),
            (_attend_chunks, (
                partials, answers, used_ptr, counter_ptr, index, sequences, schedule, meeting, blocks, tiles,
                out_tiles, scale, NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL,
                PAIRS_PER_ITEM, WITH_SHARED, gl.constexpr(1),
            )),
            (_copy_chunks, (
                pointers, index, sequences, schedule, first_head, blocks, tiles, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, VALUE_DIM, BLOCK_SIZE,
                PAIRS_PER_ITEM,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def constants(tile: TileShape) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_partial`` and ``_merge``."""
    return {
        "PAIRS_PER_ITEM": tile.pairs_per_item, "STAGES": STAGES.get(tile.keys, MOST_STAGES),
        "REGISTERS": REGISTERS, "COPYING_REGISTERS": COPYING_REGISTERS, "num_warps": 4,
        "launch_cooperative_grid": True,
    }  # fmt: skip

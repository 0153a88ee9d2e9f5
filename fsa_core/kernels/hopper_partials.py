"""Partials of selected attention and their merge, for Hopper: ``partials._partial`` and ``_merge`` in Gluon.

One launch for all chunks of a group, whose rows are merged while the next chunk's items are attended
(``hopper_chunks``). Where query tiles left nothing, it ends.

A row's numbers depend on nothing but the row, and slots are added in their order: the bits are the twins'.
"""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fsa_core.kernels.hopper_chunks import (
    BUFFERS,
    MARK_ROWS,
    MARKS_LAYOUT,
    MERGED_ROWS,
    MERGED_TILES,
    MERGING_WARPS,
    QUAD,
    SLOTS,
    any_items,
    buffer_rows,
    chunk_of,
    chunks_of,
    copy_quad,
    look_through,
    meet,
    merged_rows,
    merged_tiles,
    new_bits,
    new_meeting,
    new_ring,
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
from fsa_core.tiles import TileShape

# Tiles of q and quads of slots in shared memory, by the keys of a block: as many as there is room for.
STAGES = {128: 3}
MOST_STAGES = 4
QUADS = {128: 1}
MOST_QUADS = 3
# Of a multiplying, a copying and a merging thread; those of the first multiplying group are what is left of
# 512.
REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS = 160, 88, 104


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
def _load_lse(partial_lse_ptr, lse_place, bits, first_slot, HEADS_PER_PAIR: gl.constexpr):
    """Log-sum-exps of a tile's rows in SLOTS slots, -inf in one that is not used."""
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, MARKS_LAYOUT))
    ptrs = partial_lse_ptr + (lse_place[:, None] + ((first_slot + slots) * HEADS_PER_PAIR)[None, :])
    mask = ((bits[:, None] >> slots[None, :]) & 1) != 0
    # What lay here before the programs met must not be found again.
    return gl.load(ptrs, mask=mask, other=float("-inf"), cache_modifier=".cg")


@gluon.jit
def _merge_tile(
    tile,
    number,
    tiles_of_head,
    partials,
    answers,
    used_ptr,
    chunk,
    tokens,
    ring,
    beside,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
):
    """A tile of a chunk's rows, the so many-th looked through: what ``partials._merge`` makes of it."""
    partial_out_ptr, partial_lse_ptr = partials
    out_ptr, lse_ptr = answers
    _first, num_tokens, num_slots = tokens
    bits_tile, weight_tile = beside
    DIM: gl.constexpr = ring[0].shape[1]
    QUADS: gl.constexpr = len(ring) // QUAD
    STRIDE: gl.constexpr = HEADS_PER_PAIR * DIM
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    row = gl.arange(0, MERGED_ROWS, row_layout)
    exists, head, token, in_pair, _marks = merged_rows(
        tile, row, chunk, tokens, tiles_of_head, HEADS_PER_PAIR, INDEX_PER_HEAD
    )
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    first_place = (head * num_tokens + token) * num_slots * HEADS_PER_PAIR + in_pair
    slot_ptrs = partial_out_ptr + ((first_place * DIM)[:, None] + dims[None, :])
    bits = bits_tile.index(number).load(row_layout)
    any_bits = bits
    for quad in gl.static_range(QUADS):
        copy_quad(ring, slot_ptrs, bits, quad, STRIDE)
    mark_row = gl.arange(0, MERGED_ROWS, MARK_ROWS)
    mark_exists, _head, mark_token, mark_in_pair, marks = merged_rows(
        tile, mark_row, chunk, tokens, tiles_of_head, HEADS_PER_PAIR, INDEX_PER_HEAD
    )
    mark_bits = bits_tile.index(number).load(MARK_ROWS)
    lse_place = (head * num_tokens + mark_token) * num_slots * HEADS_PER_PAIR + mark_in_pair
    lse = _load_lse(partial_lse_ptr, lse_place, mark_bits, 0, HEADS_PER_PAIR)
    place = token * NUM_Q_HEADS + (head * HEADS_PER_PAIR + in_pair)
    answer_ptrs = out_ptr + ((place * DIM)[:, None] + dims[None, :])
    shared_lse = gl.full([MERGED_ROWS], float("-inf"), gl.float32, MARK_ROWS)
    acc = gl.zeros([MERGED_ROWS, DIM], gl.float32, layout)
    if WITH_SHARED:
        mark_place = mark_token * NUM_Q_HEADS + (head * HEADS_PER_PAIR + mark_in_pair)
        shared_lse = gl.load(lse_ptr + mark_place, mask=mark_exists, other=float("-inf")) / LN_2
        acc = gl.load(answer_ptrs, mask=exists[:, None], other=0.0).to(gl.float32)
    row_max = gl.maximum(shared_lse, gl.max(lse, 1))
    for first_slot in range(SLOTS, num_slots, SLOTS):
        more_bits = used_slots(used_ptr, marks, mark_exists, first_slot, num_slots)
        more_lse = _load_lse(partial_lse_ptr, lse_place, more_bits, first_slot, HEADS_PER_PAIR)
        row_max = gl.maximum(row_max, gl.max(more_lse, 1))
    shift = gl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = gl.convert_layout(gl.exp2(shared_lse - shift), row_layout)
    acc *= row_sum[:, None]
    by_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    weight_rows = weight_tile._reinterpret(gl.float32, [SLOTS, MERGED_ROWS], by_rows).permute([1, 0])
    for first_slot in range(0, num_slots, SLOTS):
        if first_slot > 0:
            slot_ptrs += SLOTS * STRIDE
            mark_bits = used_slots(used_ptr, marks, mark_exists, first_slot, num_slots)
            bits = gl.convert_layout(mark_bits, row_layout)
            any_bits |= bits
            for quad in gl.static_range(QUADS):
                copy_quad(ring, slot_ptrs, bits, quad, STRIDE)
            lse = _load_lse(partial_lse_ptr, lse_place, mark_bits, first_slot, HEADS_PER_PAIR)
        weight_rows.store(gl.exp2(lse - shift[:, None]))
        for quad in gl.static_range(SLOTS // QUAD):
            if quad * QUAD < num_slots - first_slot:
                async_copy.wait_group(QUADS - 1)
                for i in gl.static_range(QUAD):
                    out = ring[(quad * QUAD + i) % len(ring)].load(layout)
                    weight = weight_tile.index(quad * QUAD + i).load(row_layout)
                    row_sum += weight
                    acc += weight[:, None] * out.to(gl.float32)
                copy_quad(ring, slot_ptrs, bits, quad + QUADS, STRIDE)
        async_copy.wait_group(0)
    if WITH_SHARED:
        # The others stay as they are.
        exists &= any_bits != 0
    acc *= share_of(row_sum)[:, None]
    gl.store(answer_ptrs, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    lse_sum = gl.convert_layout(row_max, row_layout) + gl.log2(row_sum)
    gl.store(lse_ptr + place, lse_sum * LN_2, mask=exists)


@gluon.jit
def _merge_chunks(
    partials,
    answers,
    used_ptr,
    counter_ptr,
    index,
    schedule,
    meeting,
    ring,
    beside,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
):
    """A chunk after the other: when all programs have its partials, every so many-th tile of its rows."""
    partial_out_ptr, partial_lse_ptr = partials
    out_ptr, lse_ptr = answers
    written, free, _gathered, _released = meeting
    DIM: gl.constexpr = ring[0].shape[1]
    rows_of_buffer = buffer_rows(schedule, HEADS_PER_PAIR)
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        if not WITH_SHARED or most_items(index, chunk, heads[1], INDEX_PER_HEAD) > 0:
            buffer = met % BUFFERS
            first_row = buffer * rows_of_buffer
            of_buffer = (partial_out_ptr + first_row * DIM, partial_lse_ptr + first_row)
            row = tokens[0].to(gl.int64) * NUM_Q_HEADS + heads[0] * HEADS_PER_PAIR
            of_chunk = (out_ptr + row * DIM, lse_ptr + row)
            mbarrier.wait(written.index(buffer), (met // BUFFERS) & 1)
            meet(meeting, counter_ptr, 2 * met)
            tiles_of_head, num_tiles = merged_tiles(tokens, heads, HEADS_PER_PAIR)
            for first_tile in range(gl.program_id(0), num_tiles, gl.num_programs(0) * MERGED_TILES):
                wanted = look_through(
                    first_tile, used_ptr, beside[0], chunk, tokens, tiles_of_head, num_tiles, HEADS_PER_PAIR,
                    INDEX_PER_HEAD,
                )  # fmt: skip
                for number in range(MERGED_TILES):
                    tile = first_tile + number * gl.num_programs(0)
                    if (tile < num_tiles) & (not WITH_SHARED or ((wanted >> number) & 1) != 0):
                        _merge_tile(
                            tile, number, tiles_of_head, of_buffer, of_chunk, used_ptr, chunk, tokens, ring,
                            beside, NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED,
                        )  # fmt: skip
            meet(meeting, counter_ptr, 2 * met + 1)
            mbarrier.arrive(free.index(buffer), count=1)
            met += 1


@gluon.jit
def _attend_chunks(
    partials,
    index,
    sequences,
    schedule,
    meeting,
    blocks,
    tiles,
    out_tiles,
    scale,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAIRS_PER_ITEM: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every second tile of each chunk's items, as soon as there is a buffer for what comes of them."""
    out_ptr, lse_ptr = partials
    written, free, _gathered, _released = meeting
    rows_of_buffer = buffer_rows(schedule, HEADS_PER_PAIR)
    # Tiles, items and chunks before.
    n = 0
    block = 0
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        if not WITH_SHARED or most_items(index, chunk, heads[1], INDEX_PER_HEAD) > 0:
            buffer = met % BUFFERS
            first_row = buffer * rows_of_buffer
            of_buffer = (out_ptr + first_row * VALUE_DIM, lse_ptr + first_row)
            mbarrier.wait(free.index(buffer), ((met // BUFFERS) & 1) ^ 1)
            n, block = _attend_items(
                of_buffer, index, sequences, chunk, tokens, heads[1], blocks, tiles, out_tiles, scale, n,
                block, HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, PAIRS_PER_ITEM, GROUP,
            )  # fmt: skip
            mbarrier.arrive(written.index(buffer), count=1)
            met += 1


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
    """What the items of every chunk need, one after the other."""
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
    QUADS: gl.constexpr,
    REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    MERGING_REGISTERS: gl.constexpr,
):
    """All chunks of a group: tokens and heads from the first on. Arguments as of ``_partial`` and ``_merge``.

    All programs have to run at once. The second of ``counts``, which nothing else uses, is 0 or -2^31 before
    and afterwards.
    """
    counter_ptr = counts_ptr + 1
    index = (pairs_ptr, offsets_ptr, item_offsets_ptr, item_segment_ptr)
    # Before what a program of four groups takes to begin.
    if WITH_SHARED:  # noqa: SIM102 - the first condition is known when the kernel is compiled
        if not any_items(item_offsets_ptr, num_chunks * (num_heads if INDEX_PER_HEAD else 1), num_segments):
            return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    blocks, tiles = new_items(dtype, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, STAGES)
    meeting = new_meeting()
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    out_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, VALUE_DIM], out_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weight_tile = gl.allocate_shared_memory(gl.float32, [SLOTS, MERGED_ROWS], flat)
    ring = new_ring(dtype, VALUE_DIM, QUADS)
    beside = (new_bits(), weight_tile)
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
                partials, index, sequences, schedule, meeting, blocks, tiles, out_tiles, scale,
                HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, PAIRS_PER_ITEM, WITH_SHARED,
                gl.constexpr(0),
            )),
            (_attend_chunks, (
                partials, index, sequences, schedule, meeting, blocks, tiles, out_tiles, scale,
                HEADS_PER_PAIR, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, PAIRS_PER_ITEM, WITH_SHARED,
                gl.constexpr(1),
            )),
            (_copy_chunks, (
                pointers, index, sequences, schedule, first_head, blocks, tiles, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, VALUE_DIM, BLOCK_SIZE,
                PAIRS_PER_ITEM,
            )),
            (_merge_chunks, (
                partials, answers, used_ptr, counter_ptr, index, schedule, meeting, ring, beside,
                NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED,
            )),
        ],
        [4, COPYING_WARPS, MERGING_WARPS],
        [REGISTERS, COPYING_REGISTERS, MERGING_REGISTERS],
    )  # fmt: skip


def constants(tile: TileShape) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_partial`` and ``_merge``."""
    return {
        "PAIRS_PER_ITEM": tile.pairs_per_item, "STAGES": STAGES.get(tile.keys, MOST_STAGES),
        "QUADS": QUADS.get(tile.keys, MOST_QUADS), "REGISTERS": REGISTERS,
        "COPYING_REGISTERS": COPYING_REGISTERS, "MERGING_REGISTERS": MERGING_REGISTERS, "num_warps": 4,
        "launch_cooperative_grid": True,
    }  # fmt: skip

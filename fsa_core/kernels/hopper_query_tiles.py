"""Attention of query tiles over what they share, for Hopper: ``query_tiles._attend`` in Gluon."""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.hopper_tiles import (
    COPYING_REGISTERS,
    COPYING_WARPS,
    REGISTERS,
    ROWS,
    SIDE,
    attend_steps,
    bits_of_half,
    copy_queries,
    copy_steps,
    multiplies,
    new_shared,
    nth_work,
    num_turns,
    share_of,
    store_out,
)
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import find_segment_sequence, first_segment, natural_lse
from fsa_core.problem import Problem
from fsa_core.tiles import QueryTile


@gluon.jit
def find_tile(
    turn,
    num_work,
    lists,
    where,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
):
    """Of this program's ``turn``-th tile: its head, its first token and the end of those that are asked for;
    what turns a packed token into a position, how many keys its sequence has, its first row of keys; where
    its list is, how many steps of that are whole and how many there are; whether any token is asked for at
    all.
    """
    _blocks_ptr, _masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr = lists
    tokens, first_tile, num_asked, num_tiles, first_head, is_ordered = where
    first_token, num_tokens, num_sequences, search_steps = tokens
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    work = nth_work(turn, is_ordered)
    exists = work < num_work
    work = gl.minimum(work, num_work - 1)
    # A head's tiles come one after the other, if not ordered: its keys and values are then in the L2 cache.
    if is_ordered != 0:
        if INDEX_PER_HEAD:
            work = gl.load(order_ptr + work)
        else:
            work = work // num_asked * num_asked + gl.load(order_ptr + work % num_asked)
    group_head = work // num_asked
    place = work % num_asked
    tile = first_tile + place
    sequence = find_segment_sequence(cu_seqlens_q_ptr, tile, num_sequences, search_steps, TOKENS)
    tile_in_sequence = tile - first_segment(cu_seqlens_q_ptr, sequence, TOKENS)
    first = gl.load(cu_seqlens_q_ptr + sequence) + tile_in_sequence * TOKENS
    q_end = gl.load(cu_seqlens_q_ptr + sequence + 1)
    k_start = gl.load(cu_seqlens_k_ptr + sequence)
    k_length = gl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    end = gl.minimum(q_end, first_token + num_tokens)
    head = first_head + group_head
    first_row = k_start.to(gl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    list_place = place.to(gl.int64)
    if INDEX_PER_HEAD:
        list_place += group_head.to(gl.int64) * num_tiles
    is_asked = exists & (first < end) & (first + TOKENS > first_token)
    num_whole = gl.load(counts_ptr + list_place * 2) * PARTS
    num_steps = gl.load(counts_ptr + list_place * 2 + 1) * PARTS
    entry = list_place * MAX_SHARED
    return head, first, end, k_length - q_end, k_length, first_row, entry, num_whole, num_steps, is_asked


@gluon.jit
def bits_of_rows(
    tile_token, TOKENS: gl.constexpr, HEADS: gl.constexpr, IS_PAIR: gl.constexpr, HALF: gl.constexpr
):
    """Of half of a tile's rows, each one's bit in a block's mask, and the bits of all of them."""
    if IS_PAIR:
        return (tile_token - HALF * (TOKENS // 2)).to(gl.int64), gl.full([], -1, gl.int64)
    else:
        return tile_token.to(gl.int64), bits_of_half(TOKENS, HEADS, HALF)


@gluon.jit
def masks_of_half(masks_ptr, entry, MAX_SHARED: gl.constexpr, IS_PAIR: gl.constexpr, HALF: gl.constexpr):
    """Where the masks of a list are that begins at ``entry``: pairs of tiles have two of each block."""
    return masks_ptr + (2 * entry + HALF * MAX_SHARED if IS_PAIR else entry)


@gluon.jit
def _copy_tiles(
    pointers,
    lists,
    where,
    shared,
    num_work,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
):
    q_ptr, k_ptr, v_ptr = pointers
    n = 0
    q_phase = 1
    for turn in range(0, num_turns(num_work)):
        head, first, end, _shift, k_length, first_row, entry, _whole, num_steps, is_asked = find_tile(
            turn, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE,
            TOKENS, MAX_SHARED,
        )  # fmt: skip
        if is_asked:
            first_q_row = first.to(gl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR
            copy_queries(
                q_ptr + first_q_row * HEAD_DIM, shared, end - first, q_phase, NUM_Q_HEADS, HEADS_PER_PAIR,
                TOKENS, HEAD_DIM,
            )  # fmt: skip
            q_phase ^= 1
            copy_steps(
                k_ptr + first_row * HEAD_DIM, v_ptr + first_row * VALUE_DIM, lists[0] + entry, shared, n,
                num_steps, k_length, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_SIZE,
            )  # fmt: skip
            n += num_steps


@gluon.jit
def _attend_tiles(
    answers,
    lists,
    where,
    shared,
    out_tiles,
    num_work,
    scale,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    IS_PAIR: gl.constexpr,
    HALF: gl.constexpr,
):
    """Half of the rows of each tile: out, and lse in natural units."""
    out_ptr, lse_ptr = answers
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    tile_rows = HALF * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, scores_layout))
    tile_token = tile_rows // HEADS_PER_PAIR
    tile_bit, half_bits = bits_of_rows(tile_token, TOKENS, HEADS_PER_PAIR, IS_PAIR, HALF)
    places = tile_token * NUM_Q_HEADS + tile_rows % HEADS_PER_PAIR
    first_token = where[0][0]
    n = 0
    q_phase = 0
    found = find_tile(
        0, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE, TOKENS,
        MAX_SHARED,
    )  # fmt: skip
    for turn in range(0, num_turns(num_work)):
        head, first, end, q_shift, k_length, _row, entry, num_whole, num_steps, is_asked = found
        # What the next tile is comes from memory while this one is attended.
        found = find_tile(
            turn + 1, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD,
            BLOCK_SIZE, TOKENS, MAX_SHARED,
        )  # fmt: skip
        if is_asked:
            if CAUSAL:
                last_key = gl.minimum(first + tile_token + q_shift, k_length - 1)
            else:
                last_key = tile_token * 0 + k_length - 1
            mbarrier.wait(shared[3], q_phase)
            q_phase ^= 1
            row_max, row_sum, acc = attend_steps(
                lists[0] + entry, masks_of_half(lists[1], entry, MAX_SHARED, IS_PAIR, HALF), shared, n,
                num_steps, 0, num_whole, last_key, tile_bit, half_bits, scale, VALUE_DIM, BLOCK_SIZE, 0, HALF,
            )  # fmt: skip
            n += num_steps
            first_place = first.to(gl.int64) * NUM_Q_HEADS + head * HEADS_PER_PAIR
            # A tile at the border of a group of tokens is attended by both groups; each writes its own.
            store_out(
                out_ptr + first_place * VALUE_DIM, out_tiles.index(HALF), acc, share_of(row_sum),
                first_token - first, end - first, NUM_Q_HEADS, HEADS_PER_PAIR, TOKENS, HALF,
            )  # fmt: skip
            asked = (tile_token < TOKENS) & (tile_token >= first_token - first) & (tile_token < end - first)
            lse = natural_lse(row_max, row_sum, scale)
            gl.store(lse_ptr + first_place + places, lse, mask=asked)


@partial(kernel, jit=gluon.jit)
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    order_ptr,
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
    num_asked,
    num_heads,
    is_ordered,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    IS_PAIR: gl.constexpr,
):
    """Arguments as of ``_attend``, the order of tiles, how many to take under how many heads, and whether in
    order.

    Lists and order as of ``tile_order.tiles_to_walk``. IS_PAIR: tiles are two of the plan's.
    """
    shared, out_tiles = new_shared(q_ptr.dtype.element_ty, HEAD_DIM, VALUE_DIM)
    pointers, answers = (q_ptr, k_ptr, v_ptr), (out_ptr, lse_ptr)
    lists = (blocks_ptr, masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr)
    tokens = (first_token, num_tokens, num_sequences, search_steps)
    where = (tokens, first_tile, num_asked, num_tiles, first_head, is_ordered)
    num_work = num_asked * num_heads
    gl.warp_specialize(
        [
            (_attend_tiles, (
                answers, lists, where, shared, out_tiles, num_work, scale, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, TOKENS,
                MAX_SHARED, IS_PAIR, gl.constexpr(0),
            )),
            (_attend_tiles, (
                answers, lists, where, shared, out_tiles, num_work, scale, NUM_Q_HEADS, NUM_KV_HEADS,
                HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, VALUE_DIM, BLOCK_SIZE, CAUSAL, TOKENS,
                MAX_SHARED, IS_PAIR, gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, lists, where, shared, num_work, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR,
                TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, TOKENS, MAX_SHARED,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def takes(problem: Problem, tile: QueryTile) -> bool:
    """Whether the heads are of a width that is multiplied, and the tile a program's, or half of one."""
    rows = tile.rows * (1 + tile.is_half)
    return multiplies(problem) and (rows, tile.keys) == (ROWS, SIDE.value)


def tile_constants(tile: QueryTile) -> dict[str, Any]:
    """Of the tiles that a program takes."""
    parts = 1 + tile.is_half
    return {"TOKENS": parts * tile.tokens, "MAX_SHARED": parts * tile.max_shared, "IS_PAIR": tile.is_half}

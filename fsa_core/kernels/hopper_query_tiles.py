"""Attention of query tiles over what they share, for Hopper: ``query_tiles._attend`` in Gluon."""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.hopper_tile_notes import find_tile, new_notes, read_note, write_last_note, write_note
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
    num_turns,
    share_of,
    store_out,
)
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import natural_lse
from fsa_core.problem import Problem
from fsa_core.tiles import QueryTile


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
    notes,
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
    taken = 0
    q_phase = 1
    for turn in range(0, num_turns(num_work)):
        note, first_row, is_asked = find_tile(
            turn, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE,
            TOKENS,
        )  # fmt: skip
        if is_asked:
            head, first, end, _shift, k_length, list_place, _whole, num_steps = note
            write_note(notes, taken, note)
            taken += 1
            entry = list_place.to(gl.int64) * MAX_SHARED
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
    write_last_note(notes, taken)


@gluon.jit
def _attend_tiles(
    answers,
    lists,
    first_token,
    shared,
    notes,
    out_tiles,
    scale,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
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
    n = 0
    taken = 0
    note = read_note(notes, taken)
    while note[7] >= 0:
        head, first, end, q_shift, k_length, list_place, num_whole, num_steps = note
        entry = list_place.to(gl.int64) * MAX_SHARED
        if CAUSAL:
            last_key = gl.minimum(first + tile_token + q_shift, k_length - 1)
        else:
            last_key = tile_token * 0 + k_length - 1
        mbarrier.wait(shared[3], taken & 1)
        taken += 1
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
        note = read_note(notes, taken)


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
    notes = new_notes()
    pointers, answers = (q_ptr, k_ptr, v_ptr), (out_ptr, lse_ptr)
    lists = (blocks_ptr, masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr)
    tokens = (first_token, num_tokens, num_sequences, search_steps)
    where = (tokens, first_tile, num_asked, num_tiles, first_head, is_ordered)
    num_work = num_asked * num_heads
    gl.warp_specialize(
        [
            (_attend_tiles, (
                answers, lists, first_token, shared, notes, out_tiles, scale, NUM_Q_HEADS, HEADS_PER_PAIR,
                VALUE_DIM, BLOCK_SIZE, CAUSAL, TOKENS, MAX_SHARED, IS_PAIR, gl.constexpr(0),
            )),
            (_attend_tiles, (
                answers, lists, first_token, shared, notes, out_tiles, scale, NUM_Q_HEADS, HEADS_PER_PAIR,
                VALUE_DIM, BLOCK_SIZE, CAUSAL, TOKENS, MAX_SHARED, IS_PAIR, gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, lists, where, shared, notes, num_work, NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR,
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

"""The gradient of q over shared blocks, for Hopper: ``tile_query_gradients._of_tiles`` in Gluon."""

from functools import partial
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.block_share import row_shift
from fsa_core.kernels.hopper_query_gradients import (
    COPYING_REGISTERS,
    REGISTERS,
    add_gradient_steps,
    copy_gradient_rows,
    find_delta,
    new_gradient_shared,
)
from fsa_core.kernels.hopper_query_tiles import bits_of_rows, masks_of_half, tile_constants
from fsa_core.kernels.hopper_tile_notes import find_tile, new_notes, read_note, write_last_note, write_note
from fsa_core.kernels.hopper_tiles import (
    COPYING_WARPS,
    ROWS,
    SIDE,
    by_rows,
    copy_steps,
    multiplies,
    num_turns,
    store_rows,
)
from fsa_core.kernels.launch import kernel
from fsa_core.problem import Problem
from fsa_core.sizes import power_of_two
from fsa_core.tiles import MAX_SORTED, QueryTile, slot_class

# With more a tile, sorting what they chose takes what the products gain.
MOST_TOKENS = 32


@gluon.jit
def _copy_tiles(
    pointers,
    lists,
    where,
    shared,
    beside,
    notes,
    num_work,
    first_delta_head,
    num_delta_heads,
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
    MAKES_DELTA: gl.constexpr,
):
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    n = 0
    taken = 0
    for turn in range(0, num_turns(num_work)):
        note, first_row, is_asked = find_tile(
            turn, num_work, lists, where, TILE_HEADS_PER_KV_HEAD, NUM_KV_HEADS, INDEX_PER_HEAD, BLOCK_SIZE,
            TOKENS,
        )  # fmt: skip
        if is_asked:
            head, first, end, _shift, k_length, list_place, _whole, num_steps = note
            write_note(notes, taken, note)
            entry = list_place.to(gl.int64) * MAX_SHARED
            first_head = head * HEADS_PER_PAIR
            first_place = first.to(gl.int64) * NUM_Q_HEADS + first_head
            first_delta = first.to(gl.int64) * num_delta_heads + (first_head - first_delta_head)
            row_pointers = (
                q_ptr + first_place * HEAD_DIM, out_ptr + first_place * VALUE_DIM,
                grad_out_ptr + first_place * VALUE_DIM, lse_ptr + first_place, delta_ptr + first_delta,
            )  # fmt: skip
            copy_gradient_rows(
                row_pointers, shared, beside, taken, n, end - first, num_delta_heads, NUM_Q_HEADS,
                HEADS_PER_PAIR, TOKENS, HEAD_DIM, VALUE_DIM, MAKES_DELTA,
            )  # fmt: skip
            taken += 1
            if MAKES_DELTA:
                n += 2
            copy_steps(
                k_ptr + first_row * HEAD_DIM, v_ptr + first_row * VALUE_DIM, lists[0] + entry, shared, n,
                num_steps, k_length, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_SIZE,
            )  # fmt: skip
            n += num_steps
    write_last_note(notes, taken)


@gluon.jit
def _add_tiles(
    grad_lse_ptr,
    delta_ptr,
    grad_q_ptr,
    lists,
    first_token,
    shared,
    beside,
    notes,
    scale,
    first_delta_head,
    num_delta_heads,
    with_grad_lse,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr,
    MAX_SHARED: gl.constexpr,
    IS_PAIR: gl.constexpr,
    MAKES_DELTA: gl.constexpr,
    HALF: gl.constexpr,
):
    """grad_q of half of the rows of each tile, and delta if it MAKES_DELTA."""
    q_tiles, _k, _v, q_ready, q_free, _ready, _free = shared
    grad_out_tiles, lse_tiles, delta_tiles = beside
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    tile_token = (HALF * SIDE + gl.arange(0, SIDE, row_layout)) // HEADS_PER_PAIR
    tile_bit, half_bits = bits_of_rows(tile_token, TOKENS, HEADS_PER_PAIR, IS_PAIR, HALF)
    n = 0
    taken = 0
    note = read_note(notes, taken)
    while note[7] >= 0:
        head, first, end, q_shift, k_length, list_place, num_whole, num_steps = note
        entry = list_place.to(gl.int64) * MAX_SHARED
        # Keys past the end of the sequence come after every token.
        last_key = first + tile_token + q_shift if CAUSAL else tile_token * 0 + k_length - 1
        mbarrier.wait(q_ready.index(HALF), taken & 1)
        taken += 1
        q = q_tiles.index(HALF)
        grad_out = grad_out_tiles.index(HALF)
        shift = row_shift(lse_tiles.index(HALF).load(row_layout))
        first_head = head * HEADS_PER_PAIR
        first_place = first.to(gl.int64) * NUM_Q_HEADS + first_head
        # A tile at the border of a group of tokens is walked by both groups; each writes its own.
        if MAKES_DELTA:
            first_delta = first.to(gl.int64) * num_delta_heads + (first_head - first_delta_head)
            delta = find_delta(
                grad_lse_ptr + first_place, delta_ptr + first_delta, num_delta_heads, shared, grad_out, n,
                first_token - first, end - first, with_grad_lse, row_layout, NUM_Q_HEADS, HEADS_PER_PAIR,
                TOKENS, HALF,
            )  # fmt: skip
            n += 2
        else:
            delta = delta_tiles.index(HALF).load(row_layout)
        grad_q = add_gradient_steps(
            lists[0] + entry, masks_of_half(lists[1], entry, MAX_SHARED, IS_PAIR, HALF), shared, q,
            grad_out, shift, delta, n, num_steps, 0, num_whole, last_key, tile_bit,
            half_bits, scale, HEAD_DIM, BLOCK_SIZE, 0,
        )  # fmt: skip
        n += num_steps
        # Where q was.
        grad_rows = by_rows(grad_q * scale, q)
        mbarrier.arrive(q_free.index(HALF), count=1)
        store_rows(
            grad_q_ptr + first_place * HEAD_DIM, grad_rows, first_token - first, end - first, NUM_Q_HEADS,
            HEADS_PER_PAIR, TOKENS, HALF,
        )  # fmt: skip
        note = read_note(notes, taken)


@partial(kernel, jit=gluon.jit)
def of_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_q_ptr,
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
    first_delta_head,
    num_delta_heads,
    num_asked,
    num_heads,
    is_ordered,
    with_grad_lse,
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
    MAKES_DELTA: gl.constexpr,
):
    """Arguments as of ``_of_tiles``, and what else ``hopper_query_tiles.attend`` has.

    MAKES_DELTA: delta = sum(out * grad_out) - grad_lse is written of the rows whose grad_q is; grad_lse is
    zeros without ``with_grad_lse``. Else it is read, and out and grad_lse are not.
    """
    shared, beside = new_gradient_shared(q_ptr.dtype.element_ty, HEAD_DIM, VALUE_DIM)
    notes = new_notes()
    pointers = (q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr)
    lists = (blocks_ptr, masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr)
    tokens = (first_token, num_tokens, num_sequences, search_steps)
    where = (tokens, first_tile, num_asked, num_tiles, first_head, is_ordered)
    num_work = num_asked * num_heads
    gl.warp_specialize(
        [
            (_add_tiles, (
                grad_lse_ptr, delta_ptr, grad_q_ptr, lists, first_token, shared, beside, notes, scale,
                first_delta_head, num_delta_heads, with_grad_lse, NUM_Q_HEADS, HEADS_PER_PAIR, HEAD_DIM,
                BLOCK_SIZE, CAUSAL, TOKENS, MAX_SHARED, IS_PAIR, MAKES_DELTA, gl.constexpr(0),
            )),
            (_add_tiles, (
                grad_lse_ptr, delta_ptr, grad_q_ptr, lists, first_token, shared, beside, notes, scale,
                first_delta_head, num_delta_heads, with_grad_lse, NUM_Q_HEADS, HEADS_PER_PAIR, HEAD_DIM,
                BLOCK_SIZE, CAUSAL, TOKENS, MAX_SHARED, IS_PAIR, MAKES_DELTA, gl.constexpr(1),
            )),
            (_copy_tiles, (
                pointers, lists, where, shared, beside, notes, num_work, first_delta_head, num_delta_heads,
                NUM_Q_HEADS, NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM,
                VALUE_DIM, BLOCK_SIZE, TOKENS, MAX_SHARED, MAKES_DELTA,
            )),
        ],
        [4, COPYING_WARPS],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def fills(problem: Problem) -> bool:
    """Whether a tile of ROWS rows may be taken, and is faster than the twin's of half as many."""
    p = problem
    tokens = ROWS // p.heads_per_pair
    is_full = 1 <= tokens <= MOST_TOKENS and power_of_two(tokens) * slot_class(p.num_slots) <= MAX_SORTED
    return multiplies(p) and is_full and p.block_size >= SIDE.value


def constants(tile: QueryTile) -> dict[str, Any]:
    """What a launch has besides the constants that it shares with ``_of_tiles``."""
    return {**tile_constants(tile), "num_warps": 4}

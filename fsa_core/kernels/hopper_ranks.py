"""The ranks of pairs in an order that never varies: ``sorted_index._rank`` by a warp a strip, in Gluon."""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fsa_core.kernels.hopper_sort import sort, to_neighbours
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import blocks_of_tokens, find_sequence

# Triton 3.6 has the first name, 3.7 the second.
wait_for_threads = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def _first_of_run(segment_a, line_a, segment_b, line_b):
    """Runs of one segment, from the left: the line that begins each."""
    return segment_b, gl.where(segment_a == segment_b, line_a, line_b)


@gluon.jit
def _chosen(
    ids, tile, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_pairs, first_token, num_slots, num_sequences,
    search_steps, BLOCK_SIZE: gl.constexpr, LOG_PAIRS: gl.constexpr,
):  # fmt: skip
    """The segments that a tile's pairs chose, -1 for none, as ``sorted_index._load_chosen`` has them."""
    SIZE: gl.constexpr = 1 << LOG_PAIRS
    first_place = tile * SIZE
    token = first_token + first_place // num_slots
    last_token = first_token + (gl.minimum(first_place + SIZE, num_pairs) - 1) // num_slots
    first, num_blocks = blocks_of_tokens(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, token, num_sequences, search_steps, BLOCK_SIZE
    )
    start_of = ids * 0 + first
    end_of = ids * 0 + num_blocks
    last_sequence = find_sequence(cu_seqlens_q_ptr, last_token, num_sequences, search_steps)
    if find_sequence(cu_seqlens_q_ptr, token, num_sequences, search_steps) != last_sequence:
        places = first_place + gl.arange(0, SIZE, ids.type.layout)
        # Of places past the last, those of the last.
        tokens = first_token + gl.minimum(places, num_pairs - 1) // num_slots
        start_of, end_of = blocks_of_tokens(
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, tokens, num_sequences, search_steps, BLOCK_SIZE
        )
    return gl.where((ids >= 0) & (ids < end_of), start_of + ids, -1)


@partial(kernel, jit=gluon.jit)
def rank(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    ranks_ptr,
    counts_ptr,
    first_token,
    num_tokens,
    chunk_tokens,
    first_head,
    head_step,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    group_pairs,
    strip_tiles,
    BLOCK_SIZE: gl.constexpr,
    LOG_PAIRS: gl.constexpr,
):
    """Arguments as of ``_rank``; a segment and a place in a tile fit 31 bits together."""
    SIZE: gl.constexpr = 1 << LOG_PAIRS
    rows_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    layout: gl.constexpr = gl.BlockedLayout([SIZE // 32], [32], [1], [0])
    strip, chunk, head = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    first_place = chunk * chunk_tokens * num_slots
    first_token += chunk * chunk_tokens
    num_pairs = gl.minimum(num_tokens - chunk * chunk_tokens, chunk_tokens) * num_slots
    indices_ptr += (first_head + head * head_step) * head_stride + first_token.to(gl.int64) * num_slots
    ranks_ptr += head * group_pairs + first_place
    counts_ptr += ((head * num_chunks + chunk) * gl.num_programs(0) + strip) * num_segments
    row = gl.arange(0, SIZE, rows_layout)
    for start in range(0, num_segments, SIZE):
        segments = start + row
        gl.store(counts_ptr + segments, row * 0, mask=segments < num_segments)
    line = gl.arange(0, SIZE, layout)
    first_tile, end_tile = strip * strip_tiles, (strip + 1) * strip_tiles
    ids = gl.load(indices_ptr + (first_tile * SIZE + row), mask=first_tile * SIZE + row < num_pairs, other=-1)
    for tile in range(first_tile, gl.minimum(end_tile, (num_pairs + SIZE - 1) // SIZE)):
        chosen = _chosen(
            ids, tile, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_pairs, first_token, num_slots, num_sequences,
            search_steps, BLOCK_SIZE, LOG_PAIRS,
        )  # fmt: skip
        # The next tile's are on their way while this one is sorted.
        next_place = (tile + 1) * SIZE + row
        ids = gl.load(
            indices_ptr + next_place, mask=next_place < gl.minimum(num_pairs, end_tile * SIZE), other=-1
        )
        # What selects nothing comes last.
        keys = (gl.where(chosen >= 0, chosen, num_segments) << LOG_PAIRS) | row
        keys = sort(to_neighbours(keys, LOG_PAIRS, 1), LOG_PAIRS)
        segments = keys >> LOG_PAIRS
        places = tile * SIZE + (keys & (SIZE - 1))
        _segments, first_line = gl.associative_scan((segments, line), 0, _first_of_run)
        _segments, last_line = gl.associative_scan((segments, line), 0, _first_of_run, reverse=True)
        exists = segments < num_segments
        # The counters pass from thread to thread, tile by tile.
        wait_for_threads()
        ranks = gl.load(counts_ptr + segments, mask=exists, other=0) + line - first_line
        gl.store(ranks_ptr + places, gl.where(exists, ranks, -1), mask=places < num_pairs)
        wait_for_threads()
        gl.store(counts_ptr + segments, ranks + 1, mask=exists & (line == last_line))

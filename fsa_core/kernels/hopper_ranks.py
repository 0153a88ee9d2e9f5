"""The ranks of pairs in an order that never varies: ``sorted_index._rank`` by a warp a strip, in Gluon.

A tile whose tokens agree chose few blocks. They are found one after the other, the least first, and each
ranks the tokens that chose it: some hundred instructions of a loop, where it takes five thousand in a row to
sort all choices of 64 tokens, 16 each. Whether a tile is of that kind shows after the first few blocks; if
not, it is sorted as if none had been found.
"""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fsa_core.kernels.hopper_sort import sort
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import blocks_of_tokens, find_sequence

# Blocks of a tile that are found before it shows whether its tokens agree, and at most: a thread has two of
# their counters. The search goes on while a block has been chosen by one in so many tokens, on the mean.
FIRST_FOUND, MOST_FOUND, SEARCH_WHILE = gl.constexpr(8), gl.constexpr(64), gl.constexpr(6)

# Triton 3.6 has the first name, 3.7 the second.
wait_for_threads = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def _first_of_run(segment_a, line_a, segment_b, line_b):
    """Runs of one segment, from the left: the line that begins each."""
    return segment_b, gl.where(segment_a == segment_b, line_a, line_b)


@gluon.jit
def _bits_set(x):
    """How many bits of a number of 32 are 1; LLVM knows the pattern, and it becomes one instruction."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24) & 0xFF).to(gl.int32)


@gluon.jit
def _count(chose, token, LOG_TOKENS: gl.constexpr):
    """Of each token how many of those before it chose a block, and how many of all did."""
    bit = gl.full([1 << LOG_TOKENS], 1, gl.uint32, token.type.layout) << (token & 31).to(gl.uint32)
    before = token * 0
    count = 0
    # What each thread has one of.
    for turn in gl.static_range(1 << (LOG_TOKENS - 5)):
        is_now = (token >> 5) == turn
        mask = gl.sum(gl.where(chose & is_now, bit, 0), 0)
        before = gl.where(is_now, count + _bits_set(mask & (bit - 1)), before)
        count += _bits_set(mask)
    return before, count


@gluon.jit
def _search(
    segments, ranks_ptr, counts_ptr, num_tokens, has_counts, LOG_TOKENS: gl.constexpr, LOG_SLOTS: gl.constexpr
):
    """Ranks a tile's pairs and counts them, if all its blocks are found before the search ends.

    Returns whether that is left to be done; then counters are as they were. ``has_counts``: not all are 0.
    """
    SLOTS: gl.constexpr = 1 << LOG_SLOTS
    layout: gl.constexpr = segments.type.layout
    token = gl.arange(0, 1 << LOG_TOKENS, gl.SliceLayout(1, layout))
    slot = gl.arange(0, SLOTS, gl.SliceLayout(0, layout))
    keys = (segments << LOG_SLOTS) | slot[None, :]
    num_choices = gl.sum(gl.sum((segments >= 0).to(gl.int32), 1), 0)
    line = gl.arange(0, MOST_FOUND, gl.BlockedLayout([1], [32], [1], [0]))
    found_segments, counts = line * 0, line * 0
    found, num_chosen = num_choices * 0, num_choices * 0
    # To the least key of a token from the first on that can be one of the next block: those of blocks that
    # have been, and those that select nothing, are larger here; with a sign they are negative.
    first_key = num_choices * 0
    ahead = gl.min(keys.to(gl.uint32), 1)
    least = gl.min(ahead, 0)
    is_on = least.to(gl.int32) >= 0
    while is_on:
        segment = (first_key + least.to(gl.int32)) >> LOG_SLOTS
        # On its way while the next block is looked for.
        base = gl.load(counts_ptr + segment, mask=has_counts, other=0)
        chose = ahead <= (least | (SLOTS - 1))
        places = (token << LOG_SLOTS) | (ahead & (SLOTS - 1)).to(gl.int32)
        first_key = (segment + 1) << LOG_SLOTS
        ahead = gl.min((keys - first_key).to(gl.uint32), 1)
        least = gl.min(ahead, 0)
        before, count = _count(chose, token, LOG_TOKENS)
        gl.store(ranks_ptr + places, base + before, mask=chose)
        found_segments = gl.where(line == found, segment, found_segments)
        counts = gl.where(line == found, base + count, counts)
        found += 1
        num_chosen += count
        agrees = (found < FIRST_FOUND) | (num_chosen * SEARCH_WHILE >= found * num_tokens)
        is_on = (least.to(gl.int32) >= 0) & (found < MOST_FOUND) & agrees
    # A block that a token has twice has been found once.
    is_left = num_chosen < num_choices
    # All have read the counters; and whoever sorts writes over the ranks.
    wait_for_threads()
    gl.store(counts_ptr + found_segments, counts, mask=(line < found) & (is_left == 0))
    if (num_choices < num_tokens * SLOTS) & (is_left == 0):
        nothing = (segments < 0) & (token < num_tokens)[:, None]
        gl.store(ranks_ptr + ((token << LOG_SLOTS)[:, None] | slot[None, :]), segments, mask=nothing)
    return is_left


@gluon.jit
def _sort(
    segments, ranks_ptr, counts_ptr, num_pairs, num_segments, LOG_ROWS: gl.constexpr, LOG_ROW: gl.constexpr
):
    """Ranks a tile's pairs and counts them; it has ``num_pairs``, -1 where one selects nothing."""
    LOG_PAIRS: gl.constexpr = LOG_ROWS + LOG_ROW
    SIZE: gl.constexpr = 1 << LOG_PAIRS
    ROW: gl.constexpr = 1 << LOG_ROW
    layout: gl.constexpr = gl.BlockedLayout([SIZE // 32], [32], [1], [0])
    rows = gl.arange(0, 1 << LOG_ROWS, gl.SliceLayout(1, segments.type.layout))
    places = (rows << LOG_ROW)[:, None] | gl.arange(0, ROW, gl.SliceLayout(0, segments.type.layout))[None, :]
    # What selects nothing comes last.
    keys = (gl.where(segments >= 0, segments, num_segments) << LOG_PAIRS) | places
    # In which order keys are does not matter yet: none moves to another thread.
    moved = keys.reshape([(1 << LOG_ROWS) // 32, 32, ROW]).permute([1, 0, 2]).reshape([SIZE])
    keys = sort(gl.convert_layout(moved, layout, assert_trivial=True), LOG_PAIRS)
    line = gl.arange(0, SIZE, layout)
    segments = keys >> LOG_PAIRS
    exists = segments < num_segments
    # From the line that begins a run: what makes ranks of its lines.
    base = gl.load(counts_ptr + segments, mask=exists, other=0) - line
    _segments, base = gl.associative_scan((segments, base), 0, _first_of_run)
    ranks = base + line
    places = keys & (SIZE - 1)
    gl.store(ranks_ptr + places, gl.where(exists, ranks, -1), mask=places < num_pairs)
    wait_for_threads()
    _segments, last_line = gl.associative_scan((segments, line), 0, _first_of_run, reverse=True)
    gl.store(counts_ptr + segments, ranks + 1, mask=exists & (line == last_line))


@gluon.jit
def _load_rows(indices_ptr, first_row, end_row, LOG_ROWS: gl.constexpr, LOG_ROW: gl.constexpr):
    """Rows of ids from a first one on, -1 from the last one on; a thread has all ids of a row."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1 << LOG_ROW], [32, 1], [1, 1], [1, 0])
    row = first_row + gl.arange(0, 1 << LOG_ROWS, gl.SliceLayout(1, layout))
    slot = gl.arange(0, 1 << LOG_ROW, gl.SliceLayout(0, layout))
    places = (row << LOG_ROW)[:, None] + slot[None, :]
    return gl.load(indices_ptr + places, mask=(row < end_row)[:, None], other=-1)


@gluon.jit
def _chosen(
    ids, first_row, end_row, cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token, token_rows, num_sequences,
    search_steps, BLOCK_SIZE: gl.constexpr, LOG_ROWS: gl.constexpr,
):  # fmt: skip
    """The segments that rows of ids chose, -1 for none, as ``sorted_index._load_chosen`` has them."""
    row = first_row + gl.arange(0, 1 << LOG_ROWS, gl.SliceLayout(1, ids.type.layout))
    token = first_token + first_row // token_rows
    last_token = first_token + (gl.minimum(first_row + (1 << LOG_ROWS), end_row) - 1) // token_rows
    first, num_blocks = blocks_of_tokens(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, token, num_sequences, search_steps, BLOCK_SIZE
    )
    start_of = row * 0 + first
    end_of = row * 0 + num_blocks
    last_sequence = find_sequence(cu_seqlens_q_ptr, last_token, num_sequences, search_steps)
    if find_sequence(cu_seqlens_q_ptr, token, num_sequences, search_steps) != last_sequence:
        # Of rows past the last, those of the last.
        tokens = first_token + gl.minimum(row, end_row - 1) // token_rows
        start_of, end_of = blocks_of_tokens(
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, tokens, num_sequences, search_steps, BLOCK_SIZE
        )
    return gl.where((ids >= 0) & (ids < end_of[:, None]), start_of[:, None] + ids, -1)


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
    LOG_ROW: gl.constexpr,
):
    """Arguments as of ``_rank``, and how long a row of ids is (see ``log_row``).

    A segment and a place in a tile fit 31 bits together.
    """
    LOG_ROWS: gl.constexpr = LOG_PAIRS - LOG_ROW
    strip, chunk, head = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    token_rows = num_slots >> LOG_ROW
    first_place = chunk * chunk_tokens * num_slots
    num_rows = gl.minimum(num_tokens - chunk * chunk_tokens, chunk_tokens) * token_rows
    first_token += chunk * chunk_tokens
    # Told in rows, so that a row is seen to be aligned.
    head_row = (first_head + head * head_step) * (head_stride >> LOG_ROW)
    indices_ptr += (head_row + first_token.to(gl.int64) * token_rows) << LOG_ROW
    ranks_ptr += head * group_pairs + first_place
    counts_ptr += ((head * num_chunks + chunk) * gl.num_programs(0) + strip) * num_segments
    line = gl.arange(0, 1 << LOG_PAIRS, gl.BlockedLayout([1], [32], [1], [0]))
    for start in range(0, num_segments, 1 << LOG_PAIRS):
        gl.store(counts_ptr + (start + line), line * 0, mask=start + line < num_segments)
    first_row = (strip * strip_tiles) << LOG_ROWS
    end_row = gl.minimum(((strip + 1) * strip_tiles) << LOG_ROWS, num_rows)
    ids = _load_rows(indices_ptr, first_row, end_row, LOG_ROWS, LOG_ROW)
    for row in range(first_row, end_row, 1 << LOG_ROWS):
        segments = _chosen(
            ids, row, end_row, cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token, token_rows, num_sequences,
            search_steps, BLOCK_SIZE, LOG_ROWS,
        )  # fmt: skip
        # The next tile's are on their way while this one is ranked.
        ids = _load_rows(indices_ptr, row + (1 << LOG_ROWS), end_row, LOG_ROWS, LOG_ROW)
        tile_ranks_ptr = ranks_ptr + (row << LOG_ROW)
        # The counters pass from thread to thread, tile by tile.
        wait_for_threads()
        is_left = True
        if LOG_ROW > 0:
            tile_tokens = gl.minimum(end_row - row, 1 << LOG_ROWS)
            is_left = _search(
                segments, tile_ranks_ptr, counts_ptr, tile_tokens, row > first_row, LOG_ROWS, LOG_ROW
            )
        if is_left:
            num_pairs = (end_row - row) << LOG_ROW
            _sort(segments, tile_ranks_ptr, counts_ptr, num_pairs, num_segments, LOG_ROWS, LOG_ROW)


def log_row(num_slots: int, log_pairs: int) -> int:
    """A row of ids, of which a thread has several, is a token's if it can be searched; else it is one id."""
    log_slots = num_slots.bit_length() - 1
    is_searched = num_slots == 1 << log_slots and log_slots + 5 <= log_pairs
    return log_slots if is_searched else 0

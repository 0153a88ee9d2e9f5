"""What kernels that walk pairs by their blocks have in common on Hopper, in Gluon.

A work item of the index is one tile here: 64 rows that chose a block. A program takes as many tiles of each
head as the others, those of one block in a run. One group of four warps copies: the block's keys and values,
then the tiles, as many ahead as shared memory has room for, also those of the next run. Two multiply, every
second tile each. What a row gives is written where its pair has its place, so that the order of tiles does
not matter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from fsa_core.kernels.hopper_chunks import BUFFERS, buffer_rows, chunk_of, chunks_of
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, copy_rows
from fsa_core.kernels.index import SLOT_BITS, SLOT_MASK
from fsa_core.kernels.primitives import find_segment_sequence

# How often a program takes its share of a head's tiles; in 1, 4 or 8 parts is slower.
ROUNDS = gl.constexpr(2)
# A warp copies or writes four half rows at once, 16 bytes a thread.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def tiles_at_once(num_tiles):
    """How many tiles, which follow one another, a program takes at a time. All take as many, or nearly."""
    parts = gl.num_programs(0) * ROUNDS
    return gl.maximum((num_tiles + parts - 1) // parts, 1)


@gluon.jit
def load_run(index, sequences, tile, num_tiles, BLOCK_SIZE: gl.constexpr):
    """What lies in memory of the block that a tile is of, as it lies there: nothing is computed of it before
    it is needed. Of a tile that is not: of the last.
    """
    offsets_ptr, item_offsets_ptr, item_segment_ptr = index
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_sequences, search_steps = sequences
    segment = gl.load(item_segment_ptr + gl.minimum(tile, num_tiles - 1))
    sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
    keys = (gl.load(cu_seqlens_k_ptr + sequence), gl.load(cu_seqlens_k_ptr + sequence + 1))
    pairs = (gl.load(offsets_ptr + segment), gl.load(offsets_ptr + segment + 1))
    tiles = (gl.load(item_offsets_ptr + segment), gl.load(item_offsets_ptr + segment + 1))
    return segment, sequence, keys, gl.load(cu_seqlens_q_ptr + sequence + 1), pairs, tiles


@gluon.jit
def run_of(loaded, tile, at_once, all_tiles, HEADS_PER_PAIR: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """From ``tile`` on a program's tiles of one block: the first pair, how many pairs and how many tiles, and
    the tile after them; the block's first key in its sequence, the first packed key of that, how many it has,
    and what turns a packed query token into a position.
    """
    PAIRS: gl.constexpr = SIDE // HEADS_PER_PAIR
    segment, sequence, keys, q_end, pairs, tiles = loaded
    block_start = (segment - (keys[0] // BLOCK_SIZE + sequence)) * BLOCK_SIZE
    k_length = keys[1] - keys[0]
    end = gl.minimum(gl.minimum((tile // at_once + 1) * at_once, all_tiles), tiles[1])
    num_tiles = end - tile
    next_tile = gl.where(end % at_once == 0, end + (gl.num_programs(0) - 1) * at_once, end)
    first_pair = pairs[0] + (tile - tiles[0]) * PAIRS
    num_pairs = gl.minimum(pairs[1] - first_pair, num_tiles * PAIRS)
    return (first_pair, num_pairs, num_tiles, next_tile), (block_start, keys[0], k_length, k_length - q_end)


@gluon.jit
def head_index(index, chunk, head, INDEX_PER_HEAD: gl.constexpr):
    """Of a head of the chunk: its lists, its pairs and how many tiles it has."""
    pairs_ptr, offsets_ptr, item_offsets_ptr, item_segment_ptr = index
    first_index_head, num_chunks, number, num_segments, group_tokens, chunk_tokens, num_slots, max_items = (
        chunk
    )
    index_head = first_index_head + head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + number
    offsets_ptr += row * (num_segments + 1)
    item_offsets_ptr += row * (num_segments + 1)
    item_segment_ptr += row.to(gl.int64) * max_items
    pairs_ptr += (index_head * group_tokens.to(gl.int64) + number * chunk_tokens) * num_slots
    lists = (offsets_ptr, item_offsets_ptr, item_segment_ptr)
    return lists, pairs_ptr, gl.load(item_offsets_ptr + num_segments)


@gluon.jit
def most_items(index, chunk, num_heads, INDEX_PER_HEAD: gl.constexpr):
    """Of any head. Where query tiles left nothing, most chunks have none."""
    most = 0
    for head in range(num_heads):
        _lists, _pairs, num_items = head_index(index, chunk, head, INDEX_PER_HEAD)
        most = gl.maximum(most, num_items)
    return most


@gluon.jit
def new_items(
    dtype: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Room for two blocks' keys and values and for tiles of rows of q with their pairs; what says that they
    are there, and that they are read.
    """
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_blocks = gl.allocate_shared_memory(dtype, [2, BLOCK_SIZE, HEAD_DIM], k_layout)
    v_blocks = gl.allocate_shared_memory(dtype, [2, BLOCK_SIZE, VALUE_DIM], v_layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], k_layout)
    pair_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, SIDE], flat)
    keys_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(keys_ready.index(place), count=32 * COPYING_WARPS)
        mbarrier.init(keys_free.index(place), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS)
        # A tile is one group's.
        mbarrier.init(free.index(stage), count=1)
    return (k_blocks, v_blocks, keys_ready, keys_free), (q_tiles, pair_tiles, ready, free)


@gluon.jit
def copy_items(
    pointers,
    index,
    sequences,
    chunk,
    heads,
    blocks,
    tiles,
    beside,
    num_delta_heads,
    n,
    run,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WITH_GRADIENTS: gl.constexpr,
):
    """Copies keys and values of each run, and its tiles in turn: rows of q, and the pair of each row.

    WITH_GRADIENTS also rows of grad_out, and of each row lse and delta, to ``beside``. Pointers to rows are
    to those of the chunk's first token and head. ``n`` tiles and ``run`` runs were before; returns how many
    are.
    """
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    first_head, num_heads = heads
    k_blocks, v_blocks, keys_ready, keys_free = blocks
    q_tiles, pair_tiles, ready, free = tiles
    STAGES: gl.constexpr = q_tiles.shape[0]
    PAIRS: gl.constexpr = SIDE // HEADS_PER_PAIR
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT))
    block_keys = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, ROWS_LAYOUT))
    flat_rows = gl.arange(0, SIDE, flat)
    for head in range(num_heads):
        lists, pairs_ptr, all_tiles = head_index(index, chunk, head, INDEX_PER_HEAD)
        kv_head = (first_head + head) // TILE_HEADS_PER_KV_HEAD
        head_row = head * HEADS_PER_PAIR
        at_once = tiles_at_once(all_tiles)
        first_tile = gl.program_id(0) * at_once
        if first_tile < all_tiles:
            # What lies in memory is asked for a run ahead, so that nothing waits for it: first pairs, then
            # the tiles of a run that come later, two at a time.
            loaded = load_run(lists, sequences, first_tile, all_tiles, BLOCK_SIZE)
            this, this_block = run_of(loaded, first_tile, at_once, all_tiles, HEADS_PER_PAIR, BLOCK_SIZE)
            later = load_run(lists, sequences, this[3], all_tiles, BLOCK_SIZE)
            pairs, next_pairs = first_pairs(pairs_ptr, this, rows, HEADS_PER_PAIR)
            flat_pairs, next_flat_pairs = pairs, next_pairs
            if WITH_GRADIENTS:
                flat_pairs, next_flat_pairs = first_pairs(pairs_ptr, this, flat_rows, HEADS_PER_PAIR)
            while first_tile < all_tiles:
                first_pair, num_pairs, num_tiles, first_tile = this
                block_start, k_start, k_length, _shift = this_block
                this, this_block = run_of(later, first_tile, at_once, all_tiles, HEADS_PER_PAIR, BLOCK_SIZE)
                later = load_run(lists, sequences, this[3], all_tiles, BLOCK_SIZE)
                run_pairs, run_next_pairs = first_pairs(pairs_ptr, this, rows, HEADS_PER_PAIR)
                run_flat_pairs, run_next_flat_pairs = run_pairs, run_next_pairs
                if WITH_GRADIENTS:
                    run_flat_pairs, run_next_flat_pairs = first_pairs(
                        pairs_ptr, this, flat_rows, HEADS_PER_PAIR
                    )
                key_row = (k_start + block_start).to(gl.int64) * NUM_KV_HEADS + kv_head
                keys, place = block_keys < k_length - block_start, run % 2
                mbarrier.wait(keys_free.index(place), ((run // 2) & 1) ^ 1)
                k_rows = block_keys * (NUM_KV_HEADS * HEAD_DIM)
                v_rows = block_keys * (NUM_KV_HEADS * VALUE_DIM)
                block_k_ptr, block_v_ptr = k_ptr + key_row * HEAD_DIM, v_ptr + key_row * VALUE_DIM
                copy_rows(block_k_ptr, k_blocks.index(place), k_rows, keys, HEAD_DIM, ROWS_LAYOUT)
                copy_rows(block_v_ptr, v_blocks.index(place), v_rows, keys, VALUE_DIM, ROWS_LAYOUT)
                async_copy.mbarrier_arrive(keys_ready.index(place), increment_count=False)
                run += 1
                for tile in range(num_tiles):
                    stage = n % STAGES
                    first = tile * PAIRS
                    mask = in_tile(first, num_pairs, rows, HEADS_PER_PAIR)
                    flat_mask = in_tile(first, num_pairs, flat_rows, HEADS_PER_PAIR)
                    q_rows = (pairs >> SLOT_BITS) * NUM_Q_HEADS + (head_row + rows % HEADS_PER_PAIR)
                    flat_tokens = flat_pairs >> SLOT_BITS
                    pair_ptrs = pairs_ptr + (first_pair + first + flat_rows // HEADS_PER_PAIR)
                    pairs = next_pairs
                    next_pairs = tile_pairs(
                        pairs_ptr, first_pair, first + 2 * PAIRS, num_pairs, rows, HEADS_PER_PAIR
                    )
                    if WITH_GRADIENTS:
                        flat_pairs = next_flat_pairs
                        next_flat_pairs = tile_pairs(
                            pairs_ptr, first_pair, first + 2 * PAIRS, num_pairs, flat_rows, HEADS_PER_PAIR
                        )
                    mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
                    copy_rows(q_ptr, q_tiles.index(stage), q_rows * HEAD_DIM, mask, HEAD_DIM, ROWS_LAYOUT)
                    async_copy.async_copy_global_to_shared(pair_tiles.index(stage), pair_ptrs, flat_mask)
                    if WITH_GRADIENTS:
                        out_tiles, lse_tiles, delta_tiles = beside
                        out_tile, out_rows = out_tiles.index(stage), q_rows * VALUE_DIM
                        copy_rows(grad_out_ptr, out_tile, out_rows, mask, VALUE_DIM, ROWS_LAYOUT)
                        head_in_chunk = head_row + flat_rows % HEADS_PER_PAIR
                        lse_ptrs = lse_ptr + (flat_tokens * NUM_Q_HEADS + head_in_chunk)
                        delta_ptrs = delta_ptr + (flat_tokens * num_delta_heads + head_in_chunk)
                        async_copy.async_copy_global_to_shared(lse_tiles.index(stage), lse_ptrs, flat_mask)
                        async_copy.async_copy_global_to_shared(
                            delta_tiles.index(stage), delta_ptrs, flat_mask
                        )
                    async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                    n += 1
                pairs, next_pairs = run_pairs, run_next_pairs
                flat_pairs, next_flat_pairs = run_flat_pairs, run_next_flat_pairs
    return n, run


@gluon.jit
def multiply_chunks(
    of_tile: gl.constexpr,
    at_row: gl.constexpr,
    x_ptr,
    given,
    index,
    sequences,
    schedule,
    meeting,
    blocks,
    tiles,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    CAUSAL: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every second tile of each chunk by ``of_tile``, as soon as there is a buffer for what comes of them:
    ``at_row`` of ``x_ptr`` and the buffer's first row. ``given`` is what ``of_tile`` takes besides.
    """
    written, free, _gathered, _released = meeting
    rows_of_buffer = buffer_rows(schedule, HEADS_PER_PAIR)
    # Tiles, runs and chunks before.
    n = 0
    run = 0
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        if not WITH_SHARED or most_items(index, chunk, heads[1], INDEX_PER_HEAD) > 0:
            buffer = met % BUFFERS
            of_buffer = at_row(x_ptr, buffer * rows_of_buffer)
            mbarrier.wait(free.index(buffer), ((met // BUFFERS) & 1) ^ 1)
            n, run = _multiply_items(
                of_tile, of_buffer, given, index, sequences, chunk, tokens, heads[1], blocks, tiles, n, run,
                HEADS_PER_PAIR, INDEX_PER_HEAD, CAUSAL, GROUP,
            )  # fmt: skip
            mbarrier.arrive(written.index(buffer), count=1)
            met += 1


@gluon.jit
def _multiply_items(
    of_tile: gl.constexpr,
    of_buffer,
    given,
    index,
    sequences,
    chunk,
    tokens,
    num_heads,
    blocks,
    tiles,
    n,
    run,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every second tile of a chunk. ``n`` tiles and ``run`` runs were before them; returns how many are."""
    first_token, num_tokens, num_slots = tokens
    k_blocks, v_blocks, keys_ready, keys_free = blocks
    q_tiles, _pair_tiles, ready, _free = tiles
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_SIZE: gl.constexpr = k_blocks.shape[1]
    PAIRS: gl.constexpr = SIDE // HEADS_PER_PAIR
    for head in range(num_heads):
        lists, _pairs, all_tiles = head_index(index, chunk, head, INDEX_PER_HEAD)
        head_place = head * num_tokens
        at_once = tiles_at_once(all_tiles)
        first_tile = gl.program_id(0) * at_once
        if first_tile < all_tiles:
            loaded = load_run(lists, sequences, first_tile, all_tiles, BLOCK_SIZE)
            while first_tile < all_tiles:
                of_run, of_block = run_of(loaded, first_tile, at_once, all_tiles, HEADS_PER_PAIR, BLOCK_SIZE)
                _first, num_pairs, num_tiles, first_tile = of_run
                block_start, _start, k_length, q_shift = of_block
                loaded = load_run(lists, sequences, first_tile, all_tiles, BLOCK_SIZE)
                first_position = first_token + q_shift
                is_cut = hides(block_start, first_position, k_length, BLOCK_SIZE, CAUSAL)
                mbarrier.wait(keys_ready.index(run % 2), (run // 2) & 1)
                k, v = k_blocks.index(run % 2), v_blocks.index(run % 2)
                for tile in range((n + GROUP) % 2, num_tiles, 2):
                    stage = (n + tile) % STAGES
                    mbarrier.wait(ready.index(stage), ((n + tile) // STAGES) & 1)
                    fence_async_shared()
                    of_tile(
                        of_buffer, given, tiles, stage, k, v, (head_place, num_slots),
                        num_pairs - tile * PAIRS, is_cut, (block_start, first_position, k_length),
                        HEADS_PER_PAIR, CAUSAL, GROUP,
                    )  # fmt: skip
                mbarrier.arrive(keys_free.index(run % 2), count=1)
                n += num_tiles
                run += 1
    return n, run


@gluon.jit
def in_tile(first, num_pairs, rows, HEADS_PER_PAIR: gl.constexpr):
    """Which rows of a tile, whose first pair is the run's ``first``, there are."""
    pair = rows // HEADS_PER_PAIR
    return (pair < SIDE // HEADS_PER_PAIR) & (first + pair < num_pairs)


@gluon.jit
def tile_pairs(pairs_ptr, first_pair, first, num_pairs, rows, HEADS_PER_PAIR: gl.constexpr):
    """The pair of each row of the run's tile whose first pair is ``first``."""
    mask = in_tile(first, num_pairs, rows, HEADS_PER_PAIR)
    return gl.load(pairs_ptr + (first_pair + first + rows // HEADS_PER_PAIR), mask=mask, other=0)


@gluon.jit
def first_pairs(pairs_ptr, run, rows, HEADS_PER_PAIR: gl.constexpr):
    """Those of a run's first two tiles."""
    first_pair, num_pairs = run[0], run[1]
    PAIRS: gl.constexpr = SIDE // HEADS_PER_PAIR
    a = tile_pairs(pairs_ptr, first_pair, 0, num_pairs, rows, HEADS_PER_PAIR)
    return a, tile_pairs(pairs_ptr, first_pair, PAIRS, num_pairs, rows, HEADS_PER_PAIR)


@gluon.jit
def hides(block_start, first_position, k_length, BLOCK_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """Whether some row may not see some key of a block; the chunk's first token sees least."""
    last_key = block_start + (BLOCK_SIZE - 1)
    return last_key > first_position if CAUSAL else last_key >= k_length


@gluon.jit
def visible(pairs, block, BLOCK_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """Which keys of a block the rows of ``pairs`` see, with its first key, the position of the chunk's first
    token and how many keys its sequence has. Keys past the end come after every token.
    """
    block_start, first_position, k_length = block
    keys = block_start + gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, pairs.type.layout.parent))
    last_key = (pairs >> SLOT_BITS) + first_position if CAUSAL else pairs * 0 + (k_length - 1)
    return keys[None, :] <= last_key[:, None]


@gluon.jit
def places_of(pairs, rows, head, HEADS_PER_PAIR: gl.constexpr):
    """Where the numbers of rows lie that have one a row: [heads, tokens, slots, HEADS_PER_PAIR].

    ``head``: how many tokens the heads before have, and how many slots a token.
    """
    head_place, num_slots = head
    place = (head_place + (pairs >> SLOT_BITS)) * num_slots + (pairs & SLOT_MASK)
    return place * HEADS_PER_PAIR + rows % HEADS_PER_PAIR


@gluon.jit
def store_places(x_ptr, x, tile, places, num_pairs, HEADS_PER_PAIR: gl.constexpr):
    """Writes x [SIDE, dim], of pairs that exist, to rows at ``places``; by way of ``tile``, shared memory."""
    DIM: gl.constexpr = x.shape[1]
    tile.store(x.to(tile.dtype))
    pair = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT)) // HEADS_PER_PAIR
    exists = (pair < SIDE // HEADS_PER_PAIR) & (pair < num_pairs)
    dims = gl.arange(0, DIM, gl.SliceLayout(0, ROWS_LAYOUT))
    ptrs = x_ptr + ((places * DIM)[:, None] + dims[None, :])
    gl.store(ptrs, tile.load(ROWS_LAYOUT), mask=exists[:, None])

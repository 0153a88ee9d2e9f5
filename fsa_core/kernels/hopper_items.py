"""What kernels that walk pairs by their blocks have in common on Hopper, in Gluon.

A work item of the index is one tile here: 64 rows that chose a block; a record says what it is. A program
takes as many tiles of each head as the others, those of one block in a run. One group of four warps copies: a
block's keys and values, then the tiles, as many ahead as shared memory has room for. Two multiply, every
second tile each. What a row gives is written where its pair has its place, so that the order of tiles does
not matter.

What a tile is, only the copying group finds out. It leaves a note of three numbers beside the rows, so that
those that multiply look at nothing else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from fsa_core.kernels.hopper_chunks import BUFFERS, buffer_rows, chunk_of, chunks_of
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, copy_rows, gather_rows
from fsa_core.kernels.index import RECORD_INTS, RECORD_PAIRS_BIT, SLOT_BITS, SLOT_MASK

# How often a program takes its share of a head's tiles; in 4 or 8 parts is slower.
ROUNDS = gl.constexpr(2)
# A warp copies or writes four half rows at once, 16 bytes a thread.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# A note says in its first number what comes: a tile, the end of a chunk or of all. Of a tile, in the bits
# above, which of the two places has its keys, whether its group reads them for the last time, and how many
# pairs it has.
TILE, CHUNK_ENDS, ALL_ENDS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
PLACE_BIT, LAST_BIT, PAIRS_BIT = gl.constexpr(2), gl.constexpr(3), gl.constexpr(4)
# Its second number is how far the chunk's first token sees into the block, as a key of it; its third the
# first row of partials of its head.
NOTE_INTS = gl.constexpr(4)
# Every thread has all of it.
NOTE_LAYOUT = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def tiles_at_once(num_tiles):
    """How many tiles, which follow one another, a program takes at a time. All take as many, or nearly."""
    parts = gl.num_programs(0) * ROUNDS
    return gl.maximum((num_tiles + parts - 1) // parts, 1)


@gluon.jit
def _load_record(records_ptr, tile, end):
    """What a tile is (``index.Inversion.items``), a number a thread; from ``end`` on, what the last is.

    What all threads share would go to a uniform register, and be waited for at once.
    """
    number = gl.arange(0, RECORD_INTS, gl.BlockedLayout([1], [32], [COPYING_WARPS], [0]))
    return gl.load(records_ptr + (gl.minimum(tile, end - 1) * RECORD_INTS + number))


@gluon.jit
def _numbers_of(record):
    """A tile's first pair, counts, first key and how far it is seen."""
    return _number_of(record, 0), _number_of(record, 1), _number_of(record, 2), _number_of(record, 3)


@gluon.jit
def _number_of(numbers, place: gl.constexpr):
    """One of a few."""
    places = gl.arange(0, numbers.shape[0], numbers.type.layout)
    return gl.sum(gl.where(places == place, numbers, 0), 0)


@gluon.jit
def head_index(index, chunk, head, INDEX_PER_HEAD: gl.constexpr):
    """Of a head of the chunk: the records of its tiles, its pairs and how many tiles it has."""
    pairs_ptr, item_offsets_ptr, records_ptr = index
    first_index_head, num_chunks, number, num_segments, group_tokens, chunk_tokens, num_slots, max_items = (
        chunk
    )
    index_head = first_index_head + head if INDEX_PER_HEAD else 0
    row = index_head * num_chunks + number
    records_ptr += row.to(gl.int64) * max_items * RECORD_INTS
    pairs_ptr += (index_head * group_tokens.to(gl.int64) + number * chunk_tokens) * num_slots
    return records_ptr, pairs_ptr, gl.load(item_offsets_ptr + row * (num_segments + 1) + num_segments)


@gluon.jit
def most_items(index, chunk, num_heads, INDEX_PER_HEAD: gl.constexpr):
    """Of any head. Where query tiles left nothing, most chunks have none."""
    most = 0
    for head in range(num_heads):
        _records, _pairs, num_items = head_index(index, chunk, head, INDEX_PER_HEAD)
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
    """Room for two blocks' keys and values, and what says that they are read. Room for tiles of rows of q
    with their pairs and notes; what says that a tile is there, and its keys, and that it is read.
    """
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_blocks = gl.allocate_shared_memory(dtype, [2, BLOCK_SIZE, HEAD_DIM], k_layout)
    v_blocks = gl.allocate_shared_memory(dtype, [2, BLOCK_SIZE, VALUE_DIM], v_layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], k_layout)
    pair_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, SIDE], flat)
    notes = gl.allocate_shared_memory(gl.int32, [STAGES, NOTE_INTS], flat)
    keys_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(keys_free.index(place), count=2)
    for stage in gl.static_range(STAGES):
        # By each copying thread when its copies arrive, and by one when the note is written.
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS + 1)
        # A tile is one group's.
        mbarrier.init(free.index(stage), count=1)
    return (k_blocks, v_blocks, keys_free), (q_tiles, pair_tiles, notes, ready, free)


@gluon.jit
def _write_note(tiles, n, word, seen, first_row):
    """What comes as tile ``n``; all that has been copied for it is under way."""
    notes, ready = tiles[2], tiles[3]
    STAGES: gl.constexpr = notes.shape[0]
    stage = n % STAGES
    number = gl.arange(0, NOTE_INTS, NOTE_LAYOUT)
    note = gl.where(number == 0, word, gl.where(number == 1, seen, first_row))
    notes.index(stage).store(note)
    async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
    mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def read_note(tiles, n):
    """The note of what comes as tile ``n``, when it has come, and its keys."""
    notes, ready = tiles[2], tiles[3]
    STAGES: gl.constexpr = notes.shape[0]
    stage = n % STAGES
    mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
    note = notes.index(stage).load(NOTE_LAYOUT)
    return _number_of(note, 0), _number_of(note, 1), _number_of(note, 2)


@gluon.jit
def kind_of(note):
    return note[0] & ((1 << PLACE_BIT) - 1)


@gluon.jit
def keys_of(note):
    """Which place has a tile's keys."""
    return (note[0] >> PLACE_BIT) & 1


@gluon.jit
def pairs_of(note):
    """How many pairs a tile has."""
    return note[0] >> PAIRS_BIT


@gluon.jit
def release_keys(blocks, note):
    """A tile's keys and values have been read."""
    mbarrier.arrive(blocks[2].index(keys_of(note)), count=1, pred=((note[0] >> LAST_BIT) & 1) != 0)


@gluon.jit
def _note_end(tiles, n, KIND: gl.constexpr):
    """Tells both groups that a chunk ends, or all; returns how many tiles are before the next."""
    free = tiles[4]
    STAGES: gl.constexpr = tiles[0].shape[0]
    for _ in gl.static_range(2):
        mbarrier.wait(free.index(n % STAGES), ((n // STAGES) & 1) ^ 1)
        _write_note(tiles, n, KIND, 0, 0)
        n += 1
    return n


@gluon.jit
def copy_chunks(
    pointers,
    index,
    schedule,
    heads,
    blocks,
    tiles,
    beside,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    WITH_GRADIENTS: gl.constexpr,
):
    """What the tiles of every chunk need, one after the other.

    ``pointers``: to q, k, v and, WITH_GRADIENTS, to grad_out, lse and delta, which else are of any kind.
    ``heads``: the first one, and how many delta has.
    """
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    first_head, num_delta_heads = heads
    rows_of_buffer = buffer_rows(schedule, HEADS_PER_PAIR).to(gl.int32)
    # Tiles, runs and chunks before.
    n = 0
    run = 0
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, of_chunk = chunk_of(schedule, c)
        chunk_head, num_heads = of_chunk
        if not WITH_SHARED or most_items(index, chunk, num_heads, INDEX_PER_HEAD) > 0:
            first = chunk_head * HEADS_PER_PAIR
            row = tokens[0].to(gl.int64) * NUM_Q_HEADS + first
            delta_row = tokens[0].to(gl.int64) * num_delta_heads + first
            rows = (
                q_ptr + row * HEAD_DIM, k_ptr, v_ptr, grad_out_ptr + row * VALUE_DIM, lse_ptr + row,
                delta_ptr + delta_row,
            )  # fmt: skip
            n, run = _copy_items(
                rows, index, chunk, (first_head + chunk_head, num_heads), tokens,
                met % BUFFERS * rows_of_buffer, blocks, tiles, beside, num_delta_heads, n, run, NUM_Q_HEADS,
                NUM_KV_HEADS, HEADS_PER_PAIR, TILE_HEADS_PER_KV_HEAD, INDEX_PER_HEAD, HEAD_DIM, VALUE_DIM,
                BLOCK_SIZE, WITH_GRADIENTS,
            )  # fmt: skip
            n = _note_end(tiles, n, CHUNK_ENDS)
            met += 1
    _note_end(tiles, n, ALL_ENDS)


@gluon.jit
def _copy_items(
    pointers,
    index,
    chunk,
    heads,
    tokens,
    first_row,
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
    to those of the chunk's first token and head, whose pairs have their places from ``first_row`` on. ``n``
    tiles and ``run`` runs were before; returns how many are.
    """
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr = pointers
    first_head, num_heads = heads
    _first_token, num_tokens, num_slots = tokens
    k_blocks, v_blocks, keys_free = blocks
    q_tiles, pair_tiles, _notes, _ready, free = tiles
    STAGES: gl.constexpr = q_tiles.shape[0]
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT))
    block_keys = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, ROWS_LAYOUT))
    flat_rows = gl.arange(0, SIDE, flat)
    k_rows = block_keys * (NUM_KV_HEADS * HEAD_DIM)
    v_rows = block_keys * (NUM_KV_HEADS * VALUE_DIM)
    for head in range(num_heads):
        records_ptr, pairs_ptr, all_tiles = head_index(index, chunk, head, INDEX_PER_HEAD)
        kv_head = (first_head + head) // TILE_HEADS_PER_KV_HEAD
        head_row = head * HEADS_PER_PAIR
        head_place = first_row + head * num_tokens * num_slots * HEADS_PER_PAIR
        at_once = tiles_at_once(all_tiles)
        for part in range(ROUNDS):
            first_tile = (part * gl.num_programs(0) + gl.program_id(0)) * at_once
            end = gl.minimum(first_tile + at_once, all_tiles)
            if first_tile < end:
                # What lies in memory is asked for ahead, so that nothing waits for it: what a tile is four
                # tiles ahead, its pairs two.
                this = _load_record(records_ptr, first_tile, end)
                following = _load_record(records_ptr, first_tile + 1, end)
                second = _load_record(records_ptr, first_tile + 2, end)
                third = _load_record(records_ptr, first_tile + 3, end)
                this, following, second = _numbers_of(this), _numbers_of(following), _numbers_of(second)
                pairs = _tile_pairs(pairs_ptr, this, rows, HEADS_PER_PAIR)
                next_pairs = _tile_pairs(pairs_ptr, following, rows, HEADS_PER_PAIR)
                flat_pairs, next_flat_pairs = pairs, next_pairs
                if WITH_GRADIENTS:
                    flat_pairs = _tile_pairs(pairs_ptr, this, flat_rows, HEADS_PER_PAIR)
                    next_flat_pairs = _tile_pairs(pairs_ptr, following, flat_rows, HEADS_PER_PAIR)
                held_key = -1
                for tile in range(first_tile, end):
                    first_pair, counts, first_key, seen = this
                    if first_key != held_key:
                        place = run % 2
                        mbarrier.wait(keys_free.index(place), ((run // 2) & 1) ^ 1)
                        key_row = first_key.to(gl.int64) * NUM_KV_HEADS + kv_head
                        keys = block_keys < (counts & ((1 << RECORD_PAIRS_BIT) - 1))
                        k_block, v_block = k_blocks.index(place), v_blocks.index(place)
                        copy_rows(k_ptr + key_row * HEAD_DIM, k_block, k_rows, keys, HEAD_DIM, ROWS_LAYOUT)
                        copy_rows(v_ptr + key_row * VALUE_DIM, v_block, v_rows, keys, VALUE_DIM, ROWS_LAYOUT)
                        # Of the group that has no tile of this run.
                        is_single = (tile + 1 == end) | (following[2] != first_key)
                        mbarrier.arrive(keys_free.index(place), count=1, pred=is_single)
                        held_key = first_key
                        run += 1
                    # Before the next one is asked for: two would lie in two registers, and moving the newer
                    # would be waiting for it.
                    later = _numbers_of(third)
                    third = _load_record(records_ptr, tile + 4, end)
                    stage = n % STAGES
                    num_pairs = counts >> RECORD_PAIRS_BIT
                    mask = in_tile(num_pairs, rows, HEADS_PER_PAIR)
                    flat_mask = in_tile(num_pairs, flat_rows, HEADS_PER_PAIR)
                    q_rows = (pairs >> SLOT_BITS) * NUM_Q_HEADS + (head_row + rows % HEADS_PER_PAIR)
                    flat_tokens = flat_pairs >> SLOT_BITS
                    pair_ptrs = pairs_ptr + (first_pair + flat_rows // HEADS_PER_PAIR)
                    pairs = next_pairs
                    next_pairs = _tile_pairs(pairs_ptr, second, rows, HEADS_PER_PAIR)
                    if WITH_GRADIENTS:
                        flat_pairs = next_flat_pairs
                        next_flat_pairs = _tile_pairs(pairs_ptr, second, flat_rows, HEADS_PER_PAIR)
                    mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
                    gather_rows(q_ptr, q_tiles.index(stage), q_rows * HEAD_DIM, mask, HEAD_DIM, ROWS_LAYOUT)
                    async_copy.async_copy_global_to_shared(pair_tiles.index(stage), pair_ptrs, flat_mask)
                    if WITH_GRADIENTS:
                        out_tiles, lse_tiles, delta_tiles = beside
                        out_tile, out_rows = out_tiles.index(stage), q_rows * VALUE_DIM
                        gather_rows(grad_out_ptr, out_tile, out_rows, mask, VALUE_DIM, ROWS_LAYOUT)
                        head_in_chunk = head_row + flat_rows % HEADS_PER_PAIR
                        lse_ptrs = lse_ptr + (flat_tokens * NUM_Q_HEADS + head_in_chunk)
                        delta_ptrs = delta_ptr + (flat_tokens * num_delta_heads + head_in_chunk)
                        async_copy.async_copy_global_to_shared(lse_tiles.index(stage), lse_ptrs, flat_mask)
                        async_copy.async_copy_global_to_shared(
                            delta_tiles.index(stage), delta_ptrs, flat_mask
                        )
                    is_last = (tile + 2 >= end) | (second[2] != first_key)
                    word = TILE + ((run - 1) % 2 << PLACE_BIT) + (num_pairs << PAIRS_BIT)
                    word += gl.where(is_last, 1 << LAST_BIT, 0)
                    _write_note(tiles, n, word, seen, head_place)
                    n += 1
                    this, following, second = following, second, later
    return n, run


@gluon.jit
def multiply_chunks(
    of_tile: gl.constexpr,
    given,
    meeting,
    blocks,
    tiles,
    HEADS_PER_PAIR: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Every second tile of each chunk by ``of_tile``, as soon as there is a buffer for what comes of them."""
    free_tiles = tiles[4]
    written, free, _gathered, _released = meeting
    STAGES: gl.constexpr = tiles[0].shape[0]
    # Tiles and chunks before.
    n = 0 + GROUP
    met = 0
    note = read_note(tiles, n)
    while kind_of(note) != ALL_ENDS:
        while kind_of(note) == TILE:
            of_tile(given, blocks, tiles, n % STAGES, note, HEADS_PER_PAIR, CAUSAL)
            n += 2
            note = read_note(tiles, n)
        mbarrier.arrive(free_tiles.index(n % STAGES), count=1)
        mbarrier.arrive(written.index(met % BUFFERS), count=1)
        met += 1
        mbarrier.wait(free.index(met % BUFFERS), ((met // BUFFERS) & 1) ^ 1)
        n += 2
        note = read_note(tiles, n)


@gluon.jit
def begin_scores(blocks, tiles, stage, note):
    """Begins to multiply a tile's scores."""
    q_tiles, k_blocks = tiles[0], blocks[0]
    BLOCK_SIZE: gl.constexpr = k_blocks.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    fence_async_shared()
    k = k_blocks.index(keys_of(note)).permute([1, 0])
    zeros = gl.zeros([SIDE, BLOCK_SIZE], gl.float32, layout)
    return warpgroup_mma(q_tiles.index(stage), k, zeros, use_acc=False, is_async=True)


@gluon.jit
def in_tile(num_pairs, rows, HEADS_PER_PAIR: gl.constexpr):
    """Which rows of a tile there are."""
    pair = rows // HEADS_PER_PAIR
    return (pair < SIDE // HEADS_PER_PAIR) & (pair < num_pairs)


@gluon.jit
def _tile_pairs(pairs_ptr, record, rows, HEADS_PER_PAIR: gl.constexpr):
    """The pair of each row of a tile."""
    mask = in_tile(record[1] >> RECORD_PAIRS_BIT, rows, HEADS_PER_PAIR)
    return gl.load(pairs_ptr + (record[0] + rows // HEADS_PER_PAIR), mask=mask, other=0)


@gluon.jit
def visible(pairs, seen, BLOCK_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """Which keys of a block the rows of ``pairs`` see. Keys past the end come after every token."""
    keys = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, pairs.type.layout.parent))
    last_key = (pairs >> SLOT_BITS) + seen if CAUSAL else pairs * 0 + seen
    return keys[None, :] <= last_key[:, None]


@gluon.jit
def places_of(pairs, rows, first_row, num_slots, HEADS_PER_PAIR: gl.constexpr):
    """Where rows have their numbers: [tokens, slots, HEADS_PER_PAIR] from ``first_row`` on."""
    place = (pairs >> SLOT_BITS) * num_slots + (pairs & SLOT_MASK)
    return first_row + place * HEADS_PER_PAIR + rows % HEADS_PER_PAIR


@gluon.jit
def store_places(x_ptr, x, tile, places, num_pairs, HEADS_PER_PAIR: gl.constexpr):
    """Writes x [SIDE, dim], of pairs that exist, to rows at ``places``; by way of ``tile``, shared memory."""
    DIM: gl.constexpr = x.shape[1]
    tile.store(x.to(tile.dtype))
    exists = in_tile(num_pairs, gl.arange(0, SIDE, gl.SliceLayout(1, ROWS_LAYOUT)), HEADS_PER_PAIR)
    dims = gl.arange(0, DIM, gl.SliceLayout(0, ROWS_LAYOUT))
    ptrs = x_ptr + ((places * DIM)[:, None] + dims[None, :])
    gl.store(ptrs, tile.load(ROWS_LAYOUT), mask=exists[:, None])

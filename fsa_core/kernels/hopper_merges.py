"""Rows of a chunk added up while the next one is attended: Gluon, for Hopper.

A group of four warps does nothing else. It has one warp a scheduler, and so waits for itself at every number
that it has just made: what it does once for eight tiles instead of for each is what makes it fast. Slots come
through a ring in shared memory (cp.async), those of the next tile while a tile's last ones are added up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core import plan
from fsa_core.kernels.hopper_chunks import BUFFERS, buffer_rows, chunk_of, chunks_of, meet
from fsa_core.kernels.hopper_items import most_items

MERGING_WARPS = gl.constexpr(4)
# Rows of a tile, and how many tiles are looked through at once.
ROWS, TILES = gl.constexpr(16), gl.constexpr(8)
# Slots that are waited for at once, and those whose bits and weights are at hand.
BATCH, SLOTS = gl.constexpr(2), gl.constexpr(16)
USED_BITS = gl.constexpr(plan.USED_BITS)
# Of all rows that are looked through at once: a row, with its slots, a thread.
MANY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))
MANY_ROWS = gl.constexpr(gl.SliceLayout(1, MANY_LAYOUT))


@gluon.jit
def rows_of_tile(tile, row, HEADS_PER_PAIR: gl.constexpr):
    """Of a tile's rows: their tokens, one head of the chunk after the other, and their heads in the pair."""
    rows = tile * ROWS + row
    return rows // HEADS_PER_PAIR, rows % HEADS_PER_PAIR


@gluon.jit
def words_of(token, chunk, num_tokens, INDEX_PER_HEAD: gl.constexpr):
    """Where the bits of a token's slots begin, and its head in the chunk."""
    first_index_head, _chunks, number, _segments, group_tokens, chunk_tokens, num_slots, _items = chunk
    head = token // num_tokens
    index_head = first_index_head + head if INDEX_PER_HEAD else head * 0
    words = (num_slots + (USED_BITS - 1)) // USED_BITS
    token_of_group = number * chunk_tokens + (token - head * num_tokens)
    return (index_head.to(gl.int64) * group_tokens + token_of_group) * words, head


@gluon.jit
def used_slots(used_ptr, place, exists, first_slot):
    """Of rows, whose words begin at ``place``, a bit for each of SLOTS slots: whether there is a pair."""
    word = gl.load(used_ptr + (place + first_slot // USED_BITS), mask=exists, other=0)
    return (word >> (first_slot % USED_BITS)) & ((1 << SLOTS) - 1)


@gluon.jit
def _both(a, b):
    return a | b


@gluon.jit
def _look_through(
    first_tile,
    used_ptr,
    found_rows,
    chunk,
    tokens,
    num_heads,
    turn,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """Of a program's next TILES tiles, a bit for each that is merged: if a row has a pair or, without
    WITH_SHARED, if there is one. To ``found_rows``, where ``turn`` says, go bits of the rows' first SLOTS
    slots, and the row of the chunk's answers, -1 for a row that is not.
    """
    _first, num_tokens, num_slots = tokens
    bits, places = found_rows
    row = gl.arange(0, TILES * ROWS, MANY_ROWS)
    tile = first_tile + row // ROWS * gl.num_programs(0)
    token, in_pair = rows_of_tile(tile, row % ROWS, HEADS_PER_PAIR)
    exists = token < num_tokens * num_heads
    words_place, head = words_of(token, chunk, num_tokens, INDEX_PER_HEAD)
    found = used_slots(used_ptr, words_place, exists, 0)
    place = (token - head * num_tokens) * NUM_Q_HEADS + (head * HEADS_PER_PAIR + in_pair)
    all_rows(bits).index(turn).store(found)
    all_rows(places).index(turn).store(gl.where(exists, place, -1))
    if WITH_SHARED:
        if MORE_SLOTS:
            for first_slot in range(SLOTS, num_slots, SLOTS):
                found |= used_slots(used_ptr, words_place, exists, first_slot)
        exists = found != 0
    return gl.reduce(gl.where(exists, 1 << row // ROWS, 0), 0, _both)


@gluon.jit
def new_numbers(dtype: gl.constexpr, COUNT: gl.constexpr):
    """Room for so many numbers of each row of as many tiles as are looked through at once, tile by tile."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(dtype, [COUNT * TILES, ROWS], flat)


@gluon.jit
def all_rows(numbers):
    """The same room, all tiles' rows at once."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return numbers._reinterpret(numbers.dtype, [numbers.shape[0] // TILES, TILES * ROWS], flat)


@gluon.jit
def new_ring(dtype: gl.constexpr, DIM: gl.constexpr, BATCHES: gl.constexpr):
    """Room for a tile of rows in so many batches of slots. Each is memory of its own: threads wait for one
    another before they write to memory that some have read.
    """
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    ring = ()
    for _ in gl.static_range(BATCHES * BATCH):
        ring = ring + (gl.allocate_shared_memory(dtype, [ROWS, DIM], shared),)  # type: ignore[assignment]
    return ring


@gluon.jit
def copy_batch(ring, ptrs, bits, batch: gl.constexpr, SLOT_STRIDE: gl.constexpr):
    """Begins to copy a batch of slots, zeros where one is not used."""
    for i in gl.static_range(BATCH):
        is_used = (bits & (1 << (batch * BATCH + i))) != 0
        slot_ptrs = ptrs + (batch * BATCH + i) * SLOT_STRIDE
        async_copy.async_copy_global_to_shared(
            ring[(batch * BATCH + i) % len(ring)], slot_ptrs, is_used[:, None]
        )
    async_copy.commit_group()


@gluon.jit
def _begin_tile(ring, ptrs, bits, SLOT_STRIDE: gl.constexpr):
    """Begins to copy as many slots of a tile as there is room for."""
    BATCHES: gl.constexpr = len(ring) // BATCH
    for batch in gl.static_range(BATCHES):
        copy_batch(ring, ptrs, bits, batch, SLOT_STRIDE)


@gluon.jit
def halves(x, layout: gl.constexpr):
    """Of x [rows, dims] in float32 every even and every odd number, which a thread has beside each other."""
    pairs = gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
    even, odd = gl.split(pairs)
    return gl.convert_layout(even, layout), gl.convert_layout(odd, layout)


@gluon.jit
def load_halves(tile, layout: gl.constexpr):
    """``halves`` of a tile of 16 bits in shared memory."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    both = tile._reinterpret(gl.int32, [tile.shape[0], tile.shape[1] // 2], shared).load(layout)
    if tile.dtype == gl.bfloat16:
        # An instruction each: those of 16 bits would be cut out first.
        return (both << 16).to(gl.float32, bitcast=True), (both & -65536).to(gl.float32, bitcast=True)
    else:
        even, odd = both.to(gl.int16), (both >> 16).to(gl.int16)
        even, odd = even.to(tile.dtype, bitcast=True), odd.to(tile.dtype, bitcast=True)
        return even.to(gl.float32), odd.to(gl.float32)


@gluon.jit
def whole(even, odd, layout: gl.constexpr):
    """What ``halves`` are of."""
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [even.shape[0], 2 * even.shape[1]]), layout)


@gluon.jit
def _slots_of_tile(
    tile, bits, x_ptr, num_slots, layout: gl.constexpr, DIM: gl.constexpr, HEADS_PER_PAIR: gl.constexpr
):
    """Of a tile's rows: where their first slots lie, and bits of the first SLOTS."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token, in_pair = rows_of_tile(tile, row, HEADS_PER_PAIR)
    first_place = token * num_slots * HEADS_PER_PAIR + in_pair
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    slot_ptrs = x_ptr + ((first_place * DIM)[:, None] + dims[None, :])
    return slot_ptrs, bits.load(row.type.layout)


@gluon.jit
def _answers_of_tile(answers_ptr, places, is_merged, layout: gl.constexpr, DIM: gl.constexpr):
    """What the rows of a tile that is merged hold."""
    place = places.load(gl.SliceLayout(1, layout))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    ptrs = answers_ptr + ((place * DIM)[:, None] + dims[None, :])
    return gl.load(ptrs, mask=((place >= 0) & is_merged)[:, None], other=0.0)


@gluon.jit
def store_answers(answers_ptr, x, places, any_bits, WITH_SHARED: gl.constexpr):
    """Writes a tile's rows; WITH_SHARED those that have a pair, and the others stay as they are."""
    layout: gl.constexpr = x.type.layout
    place = places.load(gl.SliceLayout(1, layout))
    dims = gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    exists = place >= 0
    if WITH_SHARED:
        exists &= any_bits != 0
    ptrs = answers_ptr + ((place * x.shape[1])[:, None] + dims[None, :])
    gl.store(ptrs, x.to(answers_ptr.dtype.element_ty), mask=exists[:, None])


@gluon.jit
def no_weights(given, first_rows, tile, number, first_slot, bits, num_slots, HEADS_PER_PAIR: gl.constexpr):
    """Slots are added as they are."""


@gluon.jit
def add_slots(
    even,
    odd,
    weigh: gl.constexpr,
    weights,
    given,
    first_rows,
    tile,
    number,
    places,
    slots,
    next_slots,
    used_ptr,
    chunk,
    tokens,
    ring,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WEIGHED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """Adds a tile's slots, one after the other, to ``even`` and ``odd``; also returns bits of a row's slots.

    ``slots``: where the rows' slots lie, and bits of the first ones, which the ring has or is about to have;
    ``next_slots`` those of the next tile, whose copies follow. ``weights`` are those of the first SLOTS of as
    many tiles as are looked through at once; ``weigh`` writes there what further ones have (MORE_SLOTS).
    """
    slot_ptrs, slot_bits = slots
    num_tokens, num_slots = tokens[1], tokens[2]
    row_layout: gl.constexpr = slot_bits.type.layout
    STRIDE: gl.constexpr = HEADS_PER_PAIR * ring[0].shape[1]
    any_bits = slot_bits
    if MORE_SLOTS:
        for first_slot in range(0, num_slots, SLOTS):
            behind_ptrs, behind_bits = next_slots
            if first_slot + SLOTS < num_slots:
                token, _in_pair = rows_of_tile(tile, gl.arange(0, ROWS, row_layout), HEADS_PER_PAIR)
                words_place, _head = words_of(token, chunk, num_tokens, INDEX_PER_HEAD)
                exists = places.load(row_layout) >= 0
                behind_ptrs = slot_ptrs + SLOTS * STRIDE
                behind_bits = used_slots(used_ptr, words_place, exists, first_slot + SLOTS)
                any_bits |= behind_bits
            if first_slot > 0:
                weigh(given, first_rows, tile, number, first_slot, slot_bits, num_slots, HEADS_PER_PAIR)
            even, odd = _add_first_slots(
                even, odd, weights, number, slot_ptrs, slot_bits, behind_ptrs, behind_bits, ring, STRIDE,
                WEIGHED,
            )  # fmt: skip
            slot_ptrs, slot_bits = behind_ptrs, behind_bits
    else:
        even, odd = _add_first_slots(
            even, odd, weights, number, slot_ptrs, slot_bits, next_slots[0], next_slots[1], ring, STRIDE,
            WEIGHED,
        )  # fmt: skip
    return even, odd, any_bits


@gluon.jit
def _add_first_slots(
    even,
    odd,
    weights,
    number,
    slot_ptrs,
    slot_bits,
    behind_ptrs,
    behind_bits,
    ring,
    STRIDE: gl.constexpr,
    WEIGHED: gl.constexpr,
):
    """Adds SLOTS slots; what is behind them, of this tile or the next, is copied to where they were."""
    BATCHES: gl.constexpr = len(ring) // BATCH
    layout: gl.constexpr = even.type.layout
    for batch in gl.static_range(SLOTS // BATCH):
        async_copy.wait_group(BATCHES - 1)
        for i in gl.static_range(BATCH):
            a, b = load_halves(ring[(batch * BATCH + i) % len(ring)], layout)
            if WEIGHED:
                place = number * SLOTS + (batch * BATCH + i)
                weight = weights.index(place).load(gl.SliceLayout(1, layout))
                # One rounding, as in the twin: what is added to has been multiplied as well, and the compiler
                # might round either product.
                even = gl.fma(weight[:, None], a, even)
                odd = gl.fma(weight[:, None], b, odd)
            else:
                even += a
                odd += b
        if batch + BATCHES < SLOTS // BATCH:
            copy_batch(ring, slot_ptrs, slot_bits, batch + BATCHES, STRIDE)
        else:
            copy_batch(ring, behind_ptrs, behind_bits, batch + BATCHES - SLOTS // BATCH, STRIDE)
    return even, odd


@gluon.jit
def merge_chunks(
    prepare: gl.constexpr,
    merge_tile: gl.constexpr,
    x_ptr,
    answers_ptr,
    given,
    used_ptr,
    counter_ptr,
    index,
    schedule,
    meeting,
    ring,
    NUM_Q_HEADS: gl.constexpr,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    WITH_SHARED: gl.constexpr,
    MORE_SLOTS: gl.constexpr,
):
    """A chunk after the other: when all programs have written it, every so many-th tile of its rows.

    ``x_ptr``: rows of both buffers; ``answers_ptr``: those of the answers. ``prepare`` looks at TILES tiles
    before ``merge_tile`` takes each; both are called with ``given``, the first row of the buffer and of the
    chunk's answers, and what they take beside. MORE_SLOTS: a row has more than SLOTS.
    """
    written, free, _gathered, _released = meeting
    DIM: gl.constexpr = ring[0].shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    bits, places = new_numbers(gl.int32, 2), new_numbers(gl.int32, 2)
    rows_of_buffer = buffer_rows(schedule, HEADS_PER_PAIR)
    met = 0
    for c in range(chunks_of(schedule)):
        chunk, tokens, heads = chunk_of(schedule, c)
        num_tokens, num_slots, num_heads = tokens[1], tokens[2], heads[1]
        if not WITH_SHARED or most_items(index, chunk, num_heads, INDEX_PER_HEAD) > 0:
            buffer = met % BUFFERS
            row = tokens[0].to(gl.int64) * NUM_Q_HEADS + heads[0] * HEADS_PER_PAIR
            first_rows = (buffer * rows_of_buffer, row)
            of_buffer, of_chunk = x_ptr + buffer * rows_of_buffer * DIM, answers_ptr + row * DIM
            num_tiles = (num_tokens * num_heads * HEADS_PER_PAIR + (ROWS - 1)) // ROWS
            step = gl.num_programs(0) * TILES
            turn = 0
            # While the others still write.
            wanted = _look_through(
                gl.program_id(0), used_ptr, (bits, places), chunk, tokens, num_heads, turn, NUM_Q_HEADS,
                HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED, MORE_SLOTS,
            )  # fmt: skip
            # A bit for the tile before, one each for those looked through, and more for those behind them.
            wanted = wanted << 1
            slot_ptrs, slot_bits = _slots_of_tile(
                gl.program_id(0), bits.index(0), of_buffer, num_slots, layout, DIM, HEADS_PER_PAIR
            )
            held = gl.zeros([ROWS, DIM], ring[0].dtype, layout)
            mbarrier.wait(written.index(buffer), (met // BUFFERS) & 1)
            meet(meeting, counter_ptr, 2 * met)
            if (wanted & 2) != 0:
                _begin_tile(ring, slot_ptrs, slot_bits, HEADS_PER_PAIR * DIM)
                if WITH_SHARED:
                    held = _answers_of_tile(of_chunk, places.index(0), True, layout, DIM)
                # As if the tile before had begun it.
                wanted |= 1
            for first_tile in range(gl.program_id(0), num_tiles, step):
                if first_tile + step < num_tiles:
                    following = _look_through(
                        first_tile + step, used_ptr, (bits, places), chunk, tokens, num_heads, turn ^ 1,
                        NUM_Q_HEADS, HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED, MORE_SLOTS,
                    )  # fmt: skip
                    wanted |= following << (TILES + 1)
                prepare(
                    given, first_rows, first_tile, all_rows(bits).index(turn), all_rows(places).index(turn),
                    used_ptr, chunk, tokens, HEADS_PER_PAIR, INDEX_PER_HEAD, WITH_SHARED, MORE_SLOTS,
                )  # fmt: skip
                for number in range(TILES):
                    tile = first_tile + number * gl.num_programs(0)
                    place = turn * TILES + number
                    next_place = (place + 1) % (2 * TILES)
                    next_ptrs, next_bits = _slots_of_tile(
                        tile + gl.num_programs(0), bits.index(next_place), of_buffer, num_slots, layout, DIM,
                        HEADS_PER_PAIR,
                    )  # fmt: skip
                    next_held = held
                    if ((wanted >> (number + 1)) & 1) != 0:
                        begun, begins = (wanted >> number) & 1, (wanted >> (number + 2)) & 1
                        if begun == 0:
                            _begin_tile(ring, slot_ptrs, slot_bits, HEADS_PER_PAIR * DIM)
                            if WITH_SHARED:
                                held = _answers_of_tile(of_chunk, places.index(place), True, layout, DIM)
                        if WITH_SHARED:
                            next_held = _answers_of_tile(
                                of_chunk, places.index(next_place), begins != 0, layout, DIM
                            )
                        merge_tile(
                            given, first_rows, tile, number, places.index(place), held,
                            (slot_ptrs, slot_bits), (next_ptrs, gl.where(begins != 0, next_bits, 0)),
                            used_ptr, chunk, tokens, ring, layout, HEADS_PER_PAIR, INDEX_PER_HEAD,
                            WITH_SHARED, MORE_SLOTS,
                        )  # fmt: skip
                        if begins == 0:
                            # No zeros are still to come where another tile's slots go.
                            async_copy.wait_group(0)
                    slot_ptrs, slot_bits, held = next_ptrs, next_bits, next_held
                wanted = wanted >> TILES
                turn ^= 1
            meet(meeting, counter_ptr, 2 * met + 1)
            mbarrier.arrive(free.index(buffer), count=1)
            met += 1

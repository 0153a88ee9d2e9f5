"""Chunks of a group one after the other in one launch, whose programs meet between them: Gluon, for Hopper.

What a chunk's work items write, its rows read once all programs have written; what its rows have read is
written over once all programs have read. A fourth group of four warps does nothing but that: it waits for the
other programs and adds a chunk's rows up while the next chunk's items are multiplied. So chunks take turns in
two buffers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

BUFFERS = gl.constexpr(2)
MERGING_WARPS = gl.constexpr(4)
# Rows that are added up at once, and tiles of them that are looked through at once for slots in use.
MERGED_ROWS = gl.constexpr(16)
MERGED_TILES = gl.constexpr(8)
# Slots that are waited for at once, and those whose marks and log-sum-exps are looked at before.
QUAD = gl.constexpr(4)
SLOTS = gl.constexpr(16)
MARKS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
MARK_ROWS = gl.constexpr(gl.SliceLayout(1, MARKS_LAYOUT))


@gluon.jit
def chunks_of(schedule):
    """How many chunks a group has: all those of the same heads before the next heads."""
    num_tokens, chunk_tokens, num_heads, chunk_heads = schedule[1], schedule[2], schedule[3], schedule[4]
    return ((num_tokens + chunk_tokens - 1) // chunk_tokens) * ((num_heads + chunk_heads - 1) // chunk_heads)


@gluon.jit
def chunk_of(schedule, c):
    """Of a chunk: where its lists are, its first token and how many it has, its first head and how many.

    Heads count from the group's first.
    """
    (
        group_first_token, group_tokens, chunk_tokens, group_heads, chunk_heads, num_chunks, num_segments,
        group_pairs, num_slots, max_items,
    ) = schedule  # fmt: skip
    token_chunks = (group_tokens + chunk_tokens - 1) // chunk_tokens
    number = c % token_chunks
    first_head = c // token_chunks * chunk_heads
    lists = (first_head, num_chunks, number, num_segments, group_pairs, chunk_tokens * num_slots, max_items)
    first = number * chunk_tokens
    num_tokens = gl.minimum(chunk_tokens, group_tokens - first)
    return lists, (group_first_token + first, num_tokens, num_slots), (
        first_head, gl.minimum(chunk_heads, group_heads - first_head),
    )  # fmt: skip


@gluon.jit
def buffer_rows(schedule, HEADS_PER_PAIR: gl.constexpr):
    """How many rows a buffer has."""
    chunk_tokens, chunk_heads, num_slots = schedule[2], schedule[4], schedule[8]
    return (chunk_tokens * chunk_heads).to(gl.int64) * (num_slots * HEADS_PER_PAIR)


@gluon.jit
def any_items(item_offsets_ptr, num_rows, num_segments):
    """Whether some chunk of the group has work items, under any index head."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    most = gl.zeros([128], gl.int32, layout)
    for start in range(0, num_rows, 128):
        rows = start + gl.arange(0, 128, layout)
        ends = item_offsets_ptr + (rows.to(gl.int64) * (num_segments + 1) + num_segments)
        most = gl.maximum(most, gl.load(ends, mask=rows < num_rows, other=0))
    return gl.max(most, 0) > 0


@gluon.jit
def new_meeting():
    """By what a program's groups learn that a buffer is written, or free; and what they wait at meanwhile."""
    written = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    gathered = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    released = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for place in gl.static_range(BUFFERS):
        # By the two multiplying groups.
        mbarrier.init(written.index(place), count=2)
        mbarrier.init(free.index(place), count=1)
    mbarrier.init(gathered, count=1)
    mbarrier.init(released, count=1)
    return written, free, gathered, released


@gluon.jit
def meet(meeting, counter_ptr, number):
    """Waits for the merging groups of all programs: what their programs have written is seen afterwards.

    The counter's low bits are zero between meetings, of which ``number`` were before; its sign turns when the
    last program comes. All programs have to run at once.
    """
    _written, _free, gathered, released = meeting
    mbarrier.arrive(gathered, count=1)
    mbarrier.wait(gathered, number & 1)
    others = gl.num_programs(0) - 1
    # Together 2^31, whichever comes last.
    step = gl.where(gl.program_id(0) == 0, 2147483647 - (others - 1), 1)
    before = gl.atomic_add(counter_ptr, step, sem="acq_rel", scope="gpu")
    while (before ^ gl.load(counter_ptr, volatile=True)) >= 0:
        pass
    # What the others have written is read from where they wrote it. (Were its answer not looked at, this
    # would be compiled to nothing.)
    seen = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    mbarrier.arrive(released, count=1, pred=(before ^ seen) < 0)
    mbarrier.wait(released, number & 1)


@gluon.jit
def merged_tiles(tokens, heads, HEADS_PER_PAIR: gl.constexpr):
    """How many tiles of MERGED_ROWS a head of a chunk has, and all of them."""
    _first_token, num_tokens, _num_slots = tokens
    _first_head, num_heads = heads
    of_head = (num_tokens * HEADS_PER_PAIR + (MERGED_ROWS - 1)) // MERGED_ROWS
    return of_head, of_head * num_heads


@gluon.jit
def merged_rows(
    tile, row, chunk, tokens, tiles_of_head, HEADS_PER_PAIR: gl.constexpr, INDEX_PER_HEAD: gl.constexpr
):
    """Of a tile's rows: whether there is one, its head, token and head in the pair, and where the marks of
    its slots begin.
    """
    first_index_head, _chunks, number, _segments, group_pairs, chunk_pairs, _items = chunk
    _first, num_tokens, num_slots = tokens
    head = tile // tiles_of_head
    rows = tile % tiles_of_head * MERGED_ROWS + row
    token = rows // HEADS_PER_PAIR
    head_in_pair = rows % HEADS_PER_PAIR
    index_head = first_index_head + head if INDEX_PER_HEAD else head * 0
    marks = index_head.to(gl.int64) * group_pairs + (number * chunk_pairs + token * num_slots)
    return token < num_tokens, head, token, head_in_pair, marks


@gluon.jit
def used_slots(used_ptr, marks, exists, first_slot, num_slots):
    """Of rows, whose marks begin at ``marks``, a bit for each of SLOTS slots: whether there is a pair."""
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, MARKS_LAYOUT))
    mask = exists[:, None] & (first_slot + slots < num_slots)[None, :]
    found = gl.load(used_ptr + (marks[:, None] + (first_slot + slots)[None, :]), mask=mask, other=-1)
    return gl.sum((found >= 0).to(gl.int32) << slots[None, :], 1)


@gluon.jit
def _both(a, b):
    return a | b


@gluon.jit
def look_through(
    first_tile,
    used_ptr,
    bits_tile,
    chunk,
    tokens,
    tiles_of_head,
    num_tiles,
    HEADS_PER_PAIR: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
):
    """Of a program's next MERGED_TILES tiles, a bit for each: whether a row has a pair. To ``bits_tile`` go
    those of its first SLOTS slots.
    """
    row = gl.arange(0, MERGED_TILES * MERGED_ROWS, MARK_ROWS)
    tile = first_tile + row // MERGED_ROWS * gl.num_programs(0)
    exists, _head, _token, _in_pair, marks = merged_rows(
        tile, row % MERGED_ROWS, chunk, tokens, tiles_of_head, HEADS_PER_PAIR, INDEX_PER_HEAD
    )
    exists &= tile < num_tiles
    bits = used_slots(used_ptr, marks, exists, 0, tokens[2])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bits_tile._reinterpret(gl.int32, [MERGED_TILES * MERGED_ROWS], flat).store(bits)
    for first_slot in range(SLOTS, tokens[2], SLOTS):
        bits |= used_slots(used_ptr, marks, exists, first_slot, tokens[2])
    return gl.reduce(gl.where(bits != 0, 1 << row // MERGED_ROWS, 0), 0, _both)


@gluon.jit
def new_bits():
    """Room for the bits of as many tiles as are looked through at once."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [MERGED_TILES, MERGED_ROWS], flat)


@gluon.jit
def new_ring(dtype: gl.constexpr, DIM: gl.constexpr, QUADS: gl.constexpr):
    """Room for a tile of rows in so many quads of slots. Each is memory of its own: threads wait for one
    another before they write to memory that some have read.
    """
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    ring = ()
    for _ in gl.static_range(QUADS * QUAD):
        ring = ring + (gl.allocate_shared_memory(dtype, [MERGED_ROWS, DIM], shared),)  # type: ignore[assignment]
    return ring


@gluon.jit
def copy_quad(ring, ptrs, bits, quad: gl.constexpr, SLOT_STRIDE: gl.constexpr):
    """Begins to copy a quad of slots, zeros where one is not used."""
    if quad * QUAD < SLOTS:
        for i in gl.static_range(QUAD):
            is_used = (bits & (1 << (quad * QUAD + i))) != 0
            slot_ptrs = ptrs + (quad * QUAD + i) * SLOT_STRIDE
            place = ring[(quad * QUAD + i) % len(ring)]
            async_copy.async_copy_global_to_shared(place, slot_ptrs, is_used[:, None])
    async_copy.commit_group()

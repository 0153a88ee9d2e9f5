"""Chunks of a group one after the other in one launch, whose programs meet between them: Gluon, for Hopper.

What a chunk's tiles write, its rows read once all programs have written; what its rows have read is
written over once all programs have read. A fourth group of four warps does nothing but that: it waits for the
other programs and adds a chunk's rows up while the next chunk's tiles are multiplied. So chunks take turns in
two buffers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

BUFFERS = gl.constexpr(2)


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
        group_first_token, num_tokens, chunk_tokens, group_heads, chunk_heads, num_chunks, num_segments,
        group_tokens, num_slots, max_items,
    ) = schedule  # fmt: skip
    token_chunks = (num_tokens + chunk_tokens - 1) // chunk_tokens
    number = c % token_chunks
    first_head = c // token_chunks * chunk_heads
    lists = (
        first_head, num_chunks, number, num_segments, group_tokens, chunk_tokens, num_slots, max_items,
    )  # fmt: skip
    first = number * chunk_tokens
    num_tokens = gl.minimum(chunk_tokens, num_tokens - first)
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

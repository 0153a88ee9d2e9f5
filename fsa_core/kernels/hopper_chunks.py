"""Chunks of a group one after the other in one launch, whose programs meet between them: Gluon, for Hopper.

What a chunk's work items write, its rows read, and what its rows have read the next chunk's items write over.
So all programs come together before its rows and behind them. While they wait the copying warps go on: what
they copy nobody writes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Rows that a multiplying group merges at once.
MERGED_ROWS = gl.constexpr(32)


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
    """What the multiplying groups wait at before and after the programs meet."""
    gathered = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    released = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(gathered, count=2)
    mbarrier.init(released, count=1)
    return gathered, released


@gluon.jit
def meet(meeting, counter_ptr, number, GROUP: gl.constexpr):
    """Waits for the multiplying groups of all programs: what they have written is seen by all afterwards.

    The counter's low bits are zero between meetings, of which ``number`` were before; its sign turns when the
    last program comes. All programs have to run at once.
    """
    gathered, released = meeting
    mbarrier.arrive(gathered, count=1)
    if GROUP == 0:
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
def merged_tiles(num_tokens, num_heads, HEADS_PER_PAIR: gl.constexpr):
    """How many tiles of MERGED_ROWS a head of a chunk has, and all of them."""
    of_head = (num_tokens * HEADS_PER_PAIR + (MERGED_ROWS - 1)) // MERGED_ROWS
    return of_head, of_head * num_heads


@gluon.jit
def used_slots(used_ptr, tokens, exists, first_slot, num_slots, layout: gl.constexpr):
    """Of rows of ``tokens``, a bit for each of 32 slots: whether it has a pair, and so no negative mark."""
    MARKS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, MARKS)
    bits = gl.arange(0, 32, gl.SliceLayout(0, MARKS))
    slots = first_slot + bits
    mark_tokens = gl.convert_layout(tokens, row_layout)
    mask = gl.convert_layout(exists, row_layout)[:, None] & (slots < num_slots)[None, :]
    marks = gl.load(used_ptr + ((mark_tokens * num_slots)[:, None] + slots[None, :]), mask=mask, other=-1)
    used = gl.sum((marks >= 0).to(gl.int32) << bits[None, :], 1)
    return gl.convert_layout(used, layout)

"""What the query tiles are that a program takes, in Gluon.

The group of warps that copies finds out, ahead of the others, since each look-up waits for the one before.
Those that multiply read eight numbers from shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core.kernels.hopper_tiles import SIDE, nth_work
from fsa_core.kernels.primitives import find_segment_sequence, first_segment

# What a tile is, in the order that ``find_tile`` has it; every thread has all of it.
NOTE_INTS = gl.constexpr(8)
NOTE_LAYOUT = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))


@gluon.jit
def find_tile(
    turn,
    num_work,
    lists,
    where,
    TILE_HEADS_PER_KV_HEAD: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    INDEX_PER_HEAD: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """What this program's ``turn``-th tile is: its head, its first token and the end of those that are asked
    for; what turns a packed token into a position, how many keys its sequence has; which list is its, how
    many steps of that are whole and how many there are. And its first row of keys; whether any token is asked
    for at all.
    """
    _blocks_ptr, _masks_ptr, counts_ptr, order_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr = lists
    tokens, first_tile, num_asked, num_tiles, first_head, is_ordered = where
    first_token, num_tokens, num_sequences, search_steps = tokens
    PARTS: gl.constexpr = BLOCK_SIZE // SIDE
    work = nth_work(turn, is_ordered)
    exists = work < num_work
    work = gl.minimum(work, num_work - 1)
    # A head's tiles come one after the other, if not ordered: its keys and values are then in the L2 cache.
    if is_ordered != 0:
        if INDEX_PER_HEAD:
            work = gl.load(order_ptr + work)
        else:
            work = work // num_asked * num_asked + gl.load(order_ptr + work % num_asked)
    group_head = work // num_asked
    place = work % num_asked
    tile = first_tile + place
    sequence = find_segment_sequence(cu_seqlens_q_ptr, tile, num_sequences, search_steps, TOKENS)
    tile_in_sequence = tile - first_segment(cu_seqlens_q_ptr, sequence, TOKENS)
    first = gl.load(cu_seqlens_q_ptr + sequence) + tile_in_sequence * TOKENS
    q_end = gl.load(cu_seqlens_q_ptr + sequence + 1)
    k_start = gl.load(cu_seqlens_k_ptr + sequence)
    k_length = gl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    end = gl.minimum(q_end, first_token + num_tokens)
    head = first_head + group_head
    first_row = k_start.to(gl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    list_place = place
    if INDEX_PER_HEAD:
        list_place += group_head * num_tiles
    is_asked = exists & (first < end) & (first + TOKENS > first_token)
    count_ptr = counts_ptr + list_place.to(gl.int64) * 2
    num_whole = gl.load(count_ptr) * PARTS
    num_steps = gl.load(count_ptr + 1) * PARTS
    note = (head, first, end, k_length - q_end, k_length, list_place, num_whole, num_steps)
    return note, first_row, is_asked


@gluon.jit
def new_notes():
    """Room for what two tiles are; what says that it is written, and that both halves have read it."""
    notes = gl.allocate_shared_memory(gl.int32, [2, NOTE_INTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    written = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(written.index(place), count=1)
        mbarrier.init(read.index(place), count=2)
    return notes, written, read


@gluon.jit
def write_note(notes, taken, note):
    """What the tile after ``taken`` others is, as ``find_tile`` has it."""
    numbers, written, read = notes
    number = gl.arange(0, NOTE_INTS, NOTE_LAYOUT)
    x = gl.where(number == 0, note[0], note[1])
    for i in gl.static_range(2, NOTE_INTS):
        x = gl.where(number == i, note[i], x)
    place = taken % 2
    mbarrier.wait(read.index(place), ((taken // 2) & 1) ^ 1)
    numbers.index(place).store(x)
    mbarrier.arrive(written.index(place), count=1)


@gluon.jit
def read_note(notes, taken):
    """What ``write_note`` has written."""
    numbers, written, read = notes
    place = taken % 2
    mbarrier.wait(written.index(place), (taken // 2) & 1)
    x = numbers.index(place).load(NOTE_LAYOUT)
    mbarrier.arrive(read.index(place), count=1)
    number = gl.arange(0, NOTE_INTS, NOTE_LAYOUT)
    note = ()
    for i in gl.static_range(NOTE_INTS):
        note = note + (gl.sum(gl.where(number == i, x, 0), 0),)
    return note


@gluon.jit
def write_last_note(notes, taken):
    """Says that no tile comes."""
    write_note(notes, taken, (0, 0, 0, 0, 0, 0, 0, -1))

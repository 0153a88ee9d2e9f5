"""Selection for Hopper: what ``selection._select`` computes of up to 16 blocks a row, in Gluon.

A program is four groups of four warps and takes every so many-th tile of 128 tokens. One group copies: for
every step of 64 blocks the keys of their windows, and the tile's queries under one head after another. Two
multiply and weigh, 64 tokens each, one while the other's products are computed, and leave in shared memory
what the windows of a step give to blocks. The fourth has a token a thread: it adds up the importance of
blocks and keeps the best of its token, while the others are at the next step.

Weights are added in the order of ``_select``, so that both select the same blocks, near ties included.
"""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from fsa_core.kernels.best_blocks import (
    MAX_ID,
    MOST_BY_THREAD,
    NONE,
    add_weights,
    candidates_of,
    in_order,
    joined,
    keep_best,
    unjoined,
)
from fsa_core.kernels.hopper_tiles import COPYING_WARPS, SIDE, copy_rows, multiplies, nth_work, num_turns
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.kernels.windows import Windows, visible_windows
from fsa_core.problem import Problem
from fsa_core.sizes import FLOAT32_BYTES

TOKENS = gl.constexpr(2 * SIDE.value)
# Of a thread that multiplies, selects, copies; those of the first multiplying group are what is left of 512.
REGISTERS, SELECTING_REGISTERS, COPYING_REGISTERS = gl.constexpr(176), gl.constexpr(112), gl.constexpr(40)
# Blocks that a thread sorts at a time: of more its registers are too few.
AT_ONCE = gl.constexpr(8)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE.value, 16]))
# A token a thread.
BY_TOKEN = gl.constexpr(gl.BlockedLayout([1, AT_ONCE.value], [32, 1], [4, 1], [1, 0]))
# What windows give, a block a row, for threads that read a token each. Every other two rows are turned by 8
# tokens, for threads that write two blocks of a token.
GIVEN = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
# Of a multiprocessor of compute capability 9.0, but for barriers and what the compiler keeps there.
SHARED_BYTES = 227 * 1024 - 1024


@gluon.jit
def _find_tile(
    turn,
    num_work,
    starts,
    where,
    NUM_KV_HEADS: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Of this program's ``turn``-th tile: its KV head, its first token and the end of its sequence's, what
    turns a token into a position; its sequence's first row of windows and how many there are; how many steps
    every token of it sees whole, and how many any sees; whether there is such a tile.
    """
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr = starts
    num_tiles, num_sequences, search_steps = where
    work = nth_work(turn, 1)
    exists = work < num_work
    work = gl.minimum(work, num_work - 1)
    # The last tiles see most: begun last, they would be what all others wait for.
    tile = num_tiles - 1 - work // NUM_KV_HEADS
    kv_head = work % NUM_KV_HEADS
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    k_length = gl.load(cu_seqlens_k_ptr + sequence + 1) - gl.load(cu_seqlens_k_ptr + sequence)
    q_shift = k_length - q_end
    first_row = gl.load(cu_seqlens_cmp_ptr + sequence).to(gl.int64) * NUM_KV_HEADS + kv_head
    num_windows = visible_windows(k_length - 1, KERNEL_SIZE, STRIDE)
    last_position = gl.minimum(first + TOKENS, q_end) - 1 + q_shift
    # Rounded up, of what may be below 0 and is then none.
    num_steps = gl.maximum(last_position + BLOCK_SIZE * SIDE, 0) // (BLOCK_SIZE * SIDE)
    num_whole = visible_windows(first + q_shift, KERNEL_SIZE, STRIDE) // (SIDE * (BLOCK_SIZE // STRIDE))
    exists &= first < q_end
    return kv_head, first, q_end, q_shift, first_row, num_windows, num_whole, num_steps, exists


@gluon.jit
def _copy_tiles(
    pointers,
    starts,
    where,
    shared,
    num_work,
    num_q_tokens,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    q_ptr, k_ptr, row_max_ptr, row_share_ptr = pointers
    q_tiles, k_tiles, stat_tiles, _given, q_barriers, k_barriers, _given_barriers = shared
    q_ready, q_free = q_barriers
    ready, free = k_barriers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [COPYING_WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [COPYING_WARPS], [0])
    STAGES: gl.constexpr = k_tiles.shape[0]
    PER_BLOCK: gl.constexpr = BLOCK_SIZE // STRIDE
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    windows = rows * PER_BLOCK
    stat_rows = gl.arange(0, TOKENS, flat)
    n = 0
    q_phase = 1
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, _shift, first_row, num_windows, _whole, num_steps, exists = _find_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, BLOCK_SIZE
        )
        if exists:
            first_q_row = first.to(gl.int64) * NUM_Q_HEADS + kv_head * GROUP_SIZE
            first_stat = (kv_head * GROUP_SIZE).to(gl.int64) * num_q_tokens + first
            for step in range(num_steps):
                for head in range(GROUP_SIZE):
                    mbarrier.wait(q_free, q_phase)
                    q_phase ^= 1
                    for half in gl.static_range(2):
                        tokens = half * SIDE + rows
                        copy_rows(
                            q_ptr + (first_q_row + head) * HEAD_DIM, q_tiles.index(half),
                            tokens * (NUM_Q_HEADS * HEAD_DIM), tokens < q_end - first, HEAD_DIM, layout,
                        )  # fmt: skip
                    stats = first_stat + head * num_q_tokens.to(gl.int64)
                    for which in gl.static_range(2):
                        stat_ptr = (row_max_ptr, row_share_ptr)[which] + stats
                        async_copy.async_copy_global_to_shared(
                            stat_tiles.index(which),
                            stat_ptr + stat_rows,
                            stat_rows < q_end - first,
                        )
                    # Every thread arrives when its own copies have.
                    async_copy.mbarrier_arrive(q_ready, increment_count=False)
                    if head == 0:
                        for offset in range(PER_BLOCK):
                            stage = n % STAGES
                            first_window = step * (SIDE * PER_BLOCK) + offset
                            row = first_row + first_window.to(gl.int64) * NUM_KV_HEADS
                            mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
                            copy_rows(
                                k_ptr + row * HEAD_DIM, k_tiles.index(stage),
                                windows * (NUM_KV_HEADS * HEAD_DIM), windows < num_windows - first_window,
                                HEAD_DIM, layout,
                            )  # fmt: skip
                            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                            n += 1


@gluon.jit
def _zeros(N: gl.constexpr, SHAPE: gl.constexpr, layout: gl.constexpr):
    zeros = ()
    for _ in gl.static_range(N):
        zeros = zeros + (gl.zeros(SHAPE, gl.float32, layout),)  # type: ignore[assignment]
    return zeros


@gluon.jit
def _weigh_step(
    shared,
    n,
    q_phase,
    first_window,
    visible,
    scale,
    GROUP_SIZE: gl.constexpr,
    PER_BLOCK: gl.constexpr,
    BEFORE: gl.constexpr,
    HALF: gl.constexpr,
    CUT: gl.constexpr,
):
    """What the windows of a step give to their blocks and to the next: a tuple of float32 [tokens, blocks].

    And how many tiles of keys were there with this step's, where ``n`` were before; and the queries' phase.
    CUT: some windows are not seen.
    """
    q_tiles, k_tiles, stat_tiles, given_tiles, q_barriers, k_barriers, _given_barriers = shared
    q_ready, q_free = q_barriers
    ready, free = k_barriers
    row_layout: gl.constexpr = gl.SliceLayout(1, SCORES)
    STAGES: gl.constexpr = k_tiles.shape[0]
    NUM_GIVEN: gl.constexpr = given_tiles.shape[0]
    zeros = gl.zeros([SIDE, SIDE], gl.float32, SCORES)
    window = gl.arange(0, SIDE, gl.SliceLayout(0, SCORES)) * PER_BLOCK
    given = _zeros(NUM_GIVEN, [SIDE, SIDE], SCORES)
    for head in range(GROUP_SIZE):
        mbarrier.wait(q_ready, q_phase)
        q_phase ^= 1
        q = q_tiles.index(HALF).load(gl.DotOperandLayout(0, SCORES, 2))
        shift = stat_tiles.index(0).slice(HALF * SIDE, SIDE).load(row_layout)
        # Rows that are not there have a share of 0, and weights that nobody asks for.
        shift -= gl.log2(stat_tiles.index(1).slice(HALF * SIDE, SIDE).load(row_layout))
        mbarrier.arrive(q_free, count=1)
        for offset in gl.static_range(PER_BLOCK):
            stage = (n + offset) % STAGES
            if head == 0:
                mbarrier.wait(ready.index(stage), ((n + offset) // STAGES) & 1)
                fence_async_shared()
            scores = warpgroup_mma(q, k_tiles.index(stage).permute([1, 0]), zeros, use_acc=False)
            weights = gl.exp2(scores * scale - shift[:, None])
            if CUT:
                seen = window[None, :] < (visible - (first_window + offset))[:, None]
                weights = gl.where(seen, weights, 0.0)
            given = add_weights(given, weights, offset, PER_BLOCK, BEFORE)
        # Counted in the loop: of what does not change in it the compiler keeps all that follows in registers,
        # where the tiles of keys lie and which of their windows are seen, more than there are.
        is_last = (head + 1) // GROUP_SIZE
        n += is_last * PER_BLOCK
        first_window += is_last * PER_BLOCK
    for offset in gl.static_range(PER_BLOCK):
        mbarrier.arrive(free.index((n - PER_BLOCK + offset) % STAGES), count=1)
    return given, n, q_phase


@gluon.jit
def _weigh_tiles(
    starts,
    where,
    shared,
    num_work,
    scale,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HALF: gl.constexpr,
):
    """What the windows of each step give to blocks, for half of each tile's tokens."""
    _q, _k, _stats, given_tiles, _q_barriers, _k_barriers, given_barriers = shared
    given_ready, given_free = given_barriers
    PER_BLOCK: gl.constexpr = BLOCK_SIZE // STRIDE
    BEFORE: gl.constexpr = KERNEL_SIZE // STRIDE - 1
    NUM_GIVEN: gl.constexpr = given_tiles.shape[0]
    n, q_phase = 0, 0
    given_phase = 1
    for turn in range(0, num_turns(num_work)):
        _kv_head, first, _q_end, q_shift, _row, _windows, num_whole, num_steps, exists = _find_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, BLOCK_SIZE
        )
        if exists:
            position = first + HALF * SIDE + q_shift + gl.arange(0, SIDE, gl.SliceLayout(1, SCORES))
            visible = visible_windows(position, KERNEL_SIZE, STRIDE)
            for step in range(num_steps):
                first_window = step * (SIDE * PER_BLOCK)
                # Whole steps compare nothing.
                if step < num_whole:
                    given, n, q_phase = _weigh_step(
                        shared, n, q_phase, first_window, visible, scale, GROUP_SIZE, PER_BLOCK, BEFORE, HALF,
                        CUT=False,
                    )  # fmt: skip
                else:
                    given, n, q_phase = _weigh_step(
                        shared, n, q_phase, first_window, visible, scale, GROUP_SIZE, PER_BLOCK, BEFORE, HALF,
                        CUT=True,
                    )  # fmt: skip
                mbarrier.wait(given_free, given_phase)
                given_phase ^= 1
                for i in gl.static_range(NUM_GIVEN):
                    given_tiles.index(i).permute([1, 0]).slice(HALF * SIDE, SIDE).store(given[i])
                mbarrier.arrive(given_ready, count=1)


@gluon.jit
def _no_candidates(N: gl.constexpr, layout: gl.constexpr):
    candidates = ()
    for _ in gl.static_range(N):
        candidates = candidates + (gl.full([TOKENS, 1], NONE, gl.int64, layout),)  # type: ignore[assignment]
    return candidates


@gluon.jit
def _of_token(x):
    """[tokens, n], of a token a thread, as a tuple of n [tokens, 1]."""
    return unjoined(gl.reshape(x, [TOKENS, 1, AT_ONCE]))


@gluon.jit
def _by_id(best, TOP_K: gl.constexpr):
    """The ids of the first TOP_K candidates, int32 [tokens, len(best)] ascending, then -1."""
    ids = ()
    for i in gl.static_range(len(best)):
        # The lowest id first: counted down it is the highest.
        ids = ids + (gl.where((best[i] == NONE) | (i >= TOP_K), -1, best[i].to(gl.int32)),)  # type: ignore[assignment]
    ids = in_order(ids)
    found = ()
    for i in gl.static_range(len(ids)):
        found = found + (gl.where(ids[i] >= 0, MAX_ID - ids[i], -1),)  # type: ignore[assignment]
    return joined(found)


@gluon.jit
def _select_tiles(
    ids_ptr,
    starts,
    where,
    shared,
    num_work,
    num_q_tokens,
    NUM_KV_HEADS: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOP_K: gl.constexpr,
    SLOTS: gl.constexpr,
    NUM_FIRST: gl.constexpr,
    NUM_LOCAL: gl.constexpr,
):
    """The ids of each tile's tokens."""
    _q, _k, _stats, given_tiles, _q_barriers, _k_barriers, given_barriers = shared
    given_ready, given_free = given_barriers
    layout: gl.constexpr = _of_token(gl.zeros([TOKENS, AT_ONCE], gl.float32, BY_TOKEN))[0].type.layout
    token_layout: gl.constexpr = gl.SliceLayout(1, layout)
    NUM_GIVEN: gl.constexpr = given_tiles.shape[0]
    PARTS: gl.constexpr = SIDE // AT_ONCE
    given_parts = given_tiles._reinterpret(gl.float32, [NUM_GIVEN * PARTS, AT_ONCE, TOKENS], GIVEN)
    thread = gl.zeros([1, 1], gl.int32, layout)
    given_phase = 0
    for turn in range(0, num_turns(num_work)):
        kv_head, first, q_end, q_shift, _row, _windows, _whole, num_steps, exists = _find_tile(
            turn, num_work, starts, where, NUM_KV_HEADS, KERNEL_SIZE, STRIDE, BLOCK_SIZE
        )
        if exists:
            tokens = first + gl.arange(0, TOKENS, token_layout)
            position = tokens + q_shift
            # Queries before the first key have no block.
            own = gl.where(position >= 0, position // BLOCK_SIZE, -1)
            best = _no_candidates(SLOTS, layout)
            carried = gl.zeros([TOKENS, 1], gl.float32, layout)
            for step in range(num_steps):
                mbarrier.wait(given_ready, given_phase)
                given_phase ^= 1
                # In a loop: written out, its instructions are more than the multiprocessor keeps at hand.
                for part in range(PARTS):
                    importance = _of_token(given_parts.index(part).permute([1, 0]).load(BY_TOKEN))
                    if NUM_GIVEN > 1:
                        given, importance = importance, ()
                        to_next = _of_token(given_parts.index(PARTS + part).permute([1, 0]).load(BY_TOKEN))
                        for i in gl.static_range(AT_ONCE):
                            importance = importance + (given[i] + carried,)
                            carried = to_next[i]
                    mbarrier.arrive(given_free, count=1, pred=part == PARTS - 1)
                    known = ()
                    for i in gl.static_range(AT_ONCE):
                        block = importance[i]
                        # A row of NaN selects as if all were equal.
                        known = known + (gl.where(block == block, block, 0.0),)  # type: ignore[assignment]
                    first_block = step * SIDE + part * AT_ONCE
                    best = keep_best(
                        best, candidates_of(known, first_block, own, thread, NUM_FIRST, NUM_LOCAL)
                    )
            ids = _by_id(best, TOP_K)
            id_tokens = first + gl.arange(0, TOKENS, gl.SliceLayout(1, ids.type.layout))
            slot = gl.arange(0, SLOTS, gl.SliceLayout(0, ids.type.layout))
            places = (kv_head.to(gl.int64) * num_q_tokens + id_tokens) * TOP_K
            mask = (id_tokens < q_end)[:, None] & (slot < TOP_K)[None, :]
            gl.store(ids_ptr + (places[:, None] + slot[None, :]), ids, mask=mask)


@partial(kernel, jit=gluon.jit)
def select(
    q_ptr,
    k_ptr,
    row_max_ptr,
    row_share_ptr,
    ids_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
    num_q_tokens,
    num_sequences,
    search_steps,
    num_tiles,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOP_K: gl.constexpr,
    SLOTS: gl.constexpr,
    NUM_FIRST: gl.constexpr,
    NUM_LOCAL: gl.constexpr,
    NUM_GIVEN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Arguments as of ``_select``, and how many tiles to take under every KV head."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [2, SIDE, HEAD_DIM], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], tile_layout)
    stat_tiles = gl.allocate_shared_memory(gl.float32, [2, TOKENS], flat)
    given_tiles = gl.allocate_shared_memory(gl.float32, [NUM_GIVEN, SIDE, TOKENS], GIVEN)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    given_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    given_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=32 * COPYING_WARPS)
    mbarrier.init(q_free, count=2)
    mbarrier.init(given_ready, count=2)
    mbarrier.init(given_free, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS)
        mbarrier.init(free.index(stage), count=2)
    shared = (
        q_tiles, k_tiles, stat_tiles, given_tiles,
        (q_ready, q_free), (ready, free), (given_ready, given_free),
    )  # fmt: skip
    starts = (cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr)
    where = (num_tiles, num_sequences, search_steps)
    num_work = num_tiles * NUM_KV_HEADS
    gl.warp_specialize(
        [
            (_weigh_tiles, (
                starts, where, shared, num_work, scale, NUM_KV_HEADS, GROUP_SIZE, KERNEL_SIZE, STRIDE,
                BLOCK_SIZE, gl.constexpr(0),
            )),
            (_weigh_tiles, (
                starts, where, shared, num_work, scale, NUM_KV_HEADS, GROUP_SIZE, KERNEL_SIZE, STRIDE,
                BLOCK_SIZE, gl.constexpr(1),
            )),
            (_select_tiles, (
                ids_ptr, starts, where, shared, num_work, num_q_tokens, NUM_KV_HEADS, KERNEL_SIZE, STRIDE,
                BLOCK_SIZE, TOP_K, SLOTS, NUM_FIRST, NUM_LOCAL,
            )),
            (_copy_tiles, (
                (q_ptr, k_ptr, row_max_ptr, row_share_ptr), starts, where, shared, num_work, num_q_tokens,
                NUM_Q_HEADS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, KERNEL_SIZE, STRIDE, BLOCK_SIZE,
            )),
        ],
        [4, 4, COPYING_WARPS],
        [REGISTERS, SELECTING_REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def stages(problem: Problem, windows: Windows, block_size: int) -> int:
    """Of keys, as many as have room beside what else lies in shared memory; 0 if those of a step have not."""
    p, per_block = problem, block_size // windows.stride
    tile_bytes = SIDE.value * p.head_dim * p.dtype.itemsize
    queries = 2 * (tile_bytes + TOKENS.value * FLOAT32_BYTES)
    given = num_given(windows, block_size) * TOKENS.value * SIDE.value * FLOAT32_BYTES
    others = queries + given
    found = min((SHARED_BYTES - others) // tile_bytes, 2 * per_block)
    return found if found >= per_block else 0


def num_given(windows: Windows, block_size: int) -> int:
    """How many blocks the windows that begin in a block reach into, this one included."""
    per_block = block_size // windows.stride
    return (per_block - 1 + windows.kernel_size // windows.stride - 1) // per_block + 1


def takes(problem: Problem, windows: Windows, block_size: int, top_k: int) -> bool:
    """Whether heads are as wide as the kernel multiplies, and everything has room on the chip.

    More is asked for than a tile of a sequence: with less a tile of twice as many tokens takes longer. Under
    one head there is too little to multiply for a group of warps that selects to pay.
    """
    p = problem
    has_many = p.num_q_tokens > TOKENS.value * p.num_sequences
    is_short = num_given(windows, block_size) <= 2
    is_taken = multiplies(p) and p.group_size > 1 and top_k <= MOST_BY_THREAD and is_short and has_many
    return is_taken and stages(p, windows, block_size) > 0

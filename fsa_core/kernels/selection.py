"""Which blocks compressed attention finds important: probabilities and the best blocks stay on the chip.

A program takes a few consecutive tokens of one sequence under one KV head and walks its blocks of keys from
the first to the last. Scores are computed again from q and the compressed keys, one query head after another;
with the maximum and the sum of each row known (``fsa_core.kernels.compressed``) they become probabilities at
once. The windows of a block are columns of different products: window r * j + o of block j is in the column
of that block in the product for offset o, so that a block's importance is a sum of products, number by
number; what a window gives to the block after its own moves by one block, once for all heads
(``best_blocks``).

Up to ``MOST_BY_THREAD`` blocks a row, each thread keeps the best of its own, sorted; more are a set in
registers, into which each step's best come one a token at a time until none beats the worst in the set: after
a few steps there are hardly any.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.best_blocks import (
    MAX_ID,
    MOST_BY_THREAD,
    NONE,
    NOT_FORCED,
    add_weights,
    best_of_row,
    block_of_column,
    candidates_of,
    importance_of,
    in_order,
    joined,
    keep_best,
)
from fsa_core.kernels.launch import kernel, multiprocessors
from fsa_core.kernels.primitives import LOG2_E
from fsa_core.kernels.query_tiles import load_block
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.kernels.windows import RowShares, Windows, last_tiles_first, visible_windows
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim, power_of_two, search_steps

# The least candidate, under which lie unused slots, and what is above all.
LEAST = tl.constexpr(-0x7F800001 * (1 << 32))
FULL = tl.constexpr((1 << 63) - 1)

# The compressed keys of a step lie in shared memory, beside two query heads; products of float32 in three
# parts have them there twice.
STEP_BYTES, STEP_BYTES_FLOAT32 = 96 * 1024, 80 * 1024
# No product of matrices is narrower.
MIN_BLOCKS, MAX_BLOCKS = 16, 64
# Of the set of the best, in registers: tokens times slots.
MAX_HELD = 4096
MIN_TOKENS, MAX_TOKENS = 16, 64


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is selected: sizes as in ``fsa_core.nsa.config``."""

    block_size: int
    top_k: int
    num_first_blocks: int
    num_local_blocks: int


@dataclass(frozen=True, slots=True)
class Selection:
    """ids int32 [num_kv_heads, num_q_tokens, top_k], ascending, then -1.

    importance float32, of each id (0 where there is none), and total float32 [num_kv_heads, num_q_tokens], of
    all blocks of a row: only if asked for.
    """

    ids: torch.Tensor
    importance: torch.Tensor | None
    total: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens of a program, and blocks of a step."""

    tokens: int
    blocks: int


@triton.jit
def _window_keys(
    k_ptr,
    first_window,
    num_windows,
    dim_mask,
    block,
    OFFSET: tl.constexpr,
    ROW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CUT: tl.constexpr,
    MASK_DIMS: tl.constexpr,
):
    """[dim, blocks]: of every block, the key of the window that begins ``OFFSET`` strides after it.

    Past the last window of all, where CUT says some may be, it is zeros.
    """
    window = block * PER_BLOCK + OFFSET
    exists = (window < num_windows - first_window)[None, :]
    k_ptrs = k_ptr + first_window.to(tl.int64) * ROW
    k_ptrs += (window * ROW)[None, :] + tl.arange(0, dim_mask.shape[0])[:, None]
    return load_block(k_ptrs, exists, dim_mask[:, None], CUT, MASK_DIMS)


@triton.jit
def _zeros(N: tl.constexpr, SHAPE: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(N):
        zeros = zeros + (tl.zeros(SHAPE, tl.float32),)  # type: ignore[assignment]
    return zeros


@triton.jit
def _given(
    q_ptrs,
    q_mask,
    k_ptr,
    row_max_ptrs,
    row_share_ptrs,
    token_mask,
    dim_mask,
    num_q_tokens,
    first_window,
    num_windows,
    visible,
    scale,
    HEAD_DIM: tl.constexpr,
    ROW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    CUT: tl.constexpr,
):
    """What the windows that begin in a block give to its importance, to the next block's, and so on.

    A tuple of float32 [tokens, BLOCKS], of the group's heads one after another; of one head alone it is not
    yet divided by the row's sum: sums of powers of two are exact. CUT: some windows are not seen.
    """
    num_tokens: tl.constexpr = q_mask.shape[0]
    mask_dims: tl.constexpr = dim_mask.shape[0] != HEAD_DIM
    num_given: tl.constexpr = (PER_BLOCK - 1 + BEFORE) // PER_BLOCK + 1
    block = block_of_column(tl.arange(0, BLOCKS), BLOCKS)
    keys = ()
    if KEEP_KEYS:
        for i in tl.static_range(PER_BLOCK):
            some = _window_keys(
                k_ptr, first_window, num_windows, dim_mask, block, i, ROW, PER_BLOCK, CUT, mask_dims
            )
            keys = keys + (some,)  # type: ignore[assignment]
    given = _zeros(num_given, (num_tokens, BLOCKS))
    for head in tl.range(0, GROUP_SIZE, num_stages=STAGES):
        q = tl.load(q_ptrs + head * HEAD_DIM, mask=q_mask, other=0.0)
        head_rows = head * tl.cast(num_q_tokens, tl.int64)
        row_max = tl.load(row_max_ptrs + head_rows, mask=token_mask, other=0.0)
        if GROUP_SIZE > 1:
            row_max -= tl.log2(tl.load(row_share_ptrs + head_rows, mask=token_mask, other=1.0))
        for i in tl.static_range(PER_BLOCK):
            if not KEEP_KEYS:
                some = _window_keys(
                    k_ptr, first_window, num_windows, dim_mask, block, i, ROW, PER_BLOCK, CUT, mask_dims
                )
            else:
                some = keys[i]
            scores = tl.dot(q, some, input_precision="tf32x3")
            weights = tl.exp2(scores * scale - row_max[:, None])
            if CUT:
                window = first_window + block * PER_BLOCK + i
                weights = tl.where(window[None, :] < visible[:, None], weights, 0.0)
            given = add_weights(given, weights, i, PER_BLOCK, BEFORE)
    return given


@triton.jit
def _no_candidates(N: tl.constexpr, TOKENS: tl.constexpr):
    candidates = ()
    for _ in tl.static_range(N):
        candidates = candidates + (tl.full((TOKENS, 4), NONE, tl.int64),)  # type: ignore[assignment]
    return candidates


@triton.jit
def _as_columns(rows):
    """A tuple of n [tokens] as [tokens, n]."""
    columns = ()
    for i in tl.static_range(len(rows)):
        columns = columns + (rows[i][:, None],)
    return joined(columns)


@triton.jit
def _kept(best, candidates, BY_THREAD: tl.constexpr):
    if BY_THREAD:
        return keep_best(best, candidates)
    else:
        return _keep_many(best, candidates)


@triton.jit
def _row_sum(parts):
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return tl.sum(total, 1)


@triton.jit
def _keep_many(best, candidates):
    """The best of ``best`` [tokens, slots], packed and in no order, and of candidates."""
    # Lists of four, the best first: then only their heads have to be looked through. A thread has all four.
    quarter: tl.constexpr = len(candidates) // 4
    heads, seconds, thirds, fourths = (), (), (), ()
    for i in tl.static_range(quarter):
        four = in_order(candidates[i::quarter])
        heads = heads + (four[0],)
        seconds = seconds + (four[1],)
        thirds = thirds + (four[2],)
        fourths = fourths + (four[3],)
    head, second, third, fourth = joined(heads), joined(seconds), joined(thirds), joined(fourths)
    worst = tl.min(best, 1)
    next_best = tl.max(head, 1)
    while tl.max((next_best > worst).to(tl.int32), 0) != 0:
        # No two are equal: one is replaced in every row, if the new one is better.
        is_replaced = (best == worst[:, None]) & (next_best > worst)[:, None]
        best = tl.where(is_replaced, next_best[:, None], best)
        is_taken = head == next_best[:, None]
        head, second = tl.where(is_taken, second, head), tl.where(is_taken, third, second)
        third, fourth = tl.where(is_taken, fourth, third), tl.where(is_taken, NONE, fourth)
        worst = tl.min(best, 1)
        next_best = tl.max(head, 1)
    return best


@kernel
def _select(
    q_ptr,
    k_ptr,
    row_max_ptr,
    row_share_ptr,
    ids_ptr,
    importance_ptr,
    total_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    scale,
    num_q_tokens,
    num_sequences,
    search_steps,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_FIRST: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BY_THREAD: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    WITH_IMPORTANCE: tl.constexpr,
):
    first, q_end, q_shift, window_start, num_windows = last_tiles_first(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_cmp_ptr, num_sequences, search_steps, KERNEL_SIZE,
        STRIDE, TOKENS,
    )  # fmt: skip
    if first >= q_end:
        return
    kv_head = tl.program_id(1)
    tokens = first + tl.arange(0, TOKENS)
    token_mask = tokens < q_end
    dims = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    first_head = kv_head * GROUP_SIZE
    q_rows = tokens.to(tl.int64) * NUM_Q_HEADS + first_head
    q_ptrs = q_ptr + q_rows[:, None] * HEAD_DIM + dims[None, :]
    q_mask = token_mask[:, None] & dim_mask[None, :]
    stat_rows = first_head.to(tl.int64) * num_q_tokens + tokens
    row_max_ptrs = row_max_ptr + stat_rows
    row_share_ptrs = row_share_ptr + stat_rows
    key_row: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    k_ptr += window_start.to(tl.int64) * key_row + kv_head * HEAD_DIM

    position = tokens + q_shift
    # Queries before the first key have no block, and neither have rows without a query.
    own = tl.where(token_mask & (position >= 0), position // BLOCK_SIZE, -1)
    visible = visible_windows(position, KERNEL_SIZE, STRIDE)
    per_block: tl.constexpr = BLOCK_SIZE // STRIDE
    before: tl.constexpr = KERNEL_SIZE // STRIDE - 1
    reach: tl.constexpr = (per_block - 1 + before) // per_block
    step_windows: tl.constexpr = BLOCKS * per_block
    num_steps = (tl.max(own, 0) + BLOCKS) // BLOCKS
    num_whole = visible_windows(first + q_shift, KERNEL_SIZE, STRIDE) // step_windows
    row_share = tl.load(row_share_ptrs, mask=token_mask, other=0.0)
    slot = tl.arange(0, SLOTS)
    thread = tl.arange(0, 4)[None, :]
    if BY_THREAD:
        best = _no_candidates(SLOTS, TOKENS)
    else:
        unused = tl.where(slot < TOP_K, LEAST - 1 - slot.to(tl.int64), FULL)
        # A row without a query takes nothing, and so keeps no other row waiting.
        best = tl.where(token_mask[:, None], unused[None, :], FULL)
    carried = _zeros(reach, (TOKENS,))
    row_total = tl.zeros((TOKENS,), tl.float32)
    for step in tl.range(0, num_steps, num_stages=1):
        first_window = step * step_windows
        # The first blocks, whose windows all tokens see, and then those behind them.
        if step < num_whole:
            given = _given(
                q_ptrs, q_mask, k_ptr, row_max_ptrs, row_share_ptrs, token_mask, dim_mask, num_q_tokens,
                first_window, num_windows, visible, scale, HEAD_DIM, key_row, GROUP_SIZE, BLOCKS, per_block,
                before, STAGES, KEEP_KEYS, False,
            )  # fmt: skip
        else:
            given = _given(
                q_ptrs, q_mask, k_ptr, row_max_ptrs, row_share_ptrs, token_mask, dim_mask, num_q_tokens,
                first_window, num_windows, visible, scale, HEAD_DIM, key_row, GROUP_SIZE, BLOCKS, per_block,
                before, STAGES, KEEP_KEYS, True,
            )  # fmt: skip
        importance, carried = importance_of(given, carried, row_share, thread, GROUP_SIZE)
        if WITH_IMPORTANCE:
            row_total += _row_sum(importance)
        best = _kept(
            best, candidates_of(importance, step * BLOCKS, own, thread, NUM_FIRST, NUM_LOCAL), BY_THREAD
        )

    if BY_THREAD:
        best = _as_columns(best_of_row(best, TOP_K))
    # In the order of ids; what is no block comes last.
    is_block = (best >= LEAST) & (best != FULL)
    high = (best >> 32).to(tl.int32)
    bits = tl.where(high < 0, high - NOT_FORCED, high)
    by_id = tl.where(is_block, ((MAX_ID - (best & MAX_ID)) << 32) | bits, FULL)
    by_id = tl.sort(by_id, 1)
    is_block = by_id != FULL
    row = kv_head.to(tl.int64) * num_q_tokens + tokens
    places = row[:, None] * TOP_K + slot[None, :]
    slot_mask = token_mask[:, None] & (slot < TOP_K)[None, :]
    tl.store(ids_ptr + places, tl.where(is_block, (by_id >> 32).to(tl.int32), -1), mask=slot_mask)
    if WITH_IMPORTANCE:
        held = tl.where(is_block, by_id, 0).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(importance_ptr + places, held, mask=slot_mask)
        tl.store(total_ptr + row, row_total, mask=token_mask)


def select_blocks_forward(
    problem: Problem,
    windows: Windows,
    blocks: Blocks,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    shares: RowShares,
    *,
    with_importance: bool,
) -> Selection:
    """The blocks that each query selects, in one launch, without a workspace.

    problem: dense attention over windows, with at least one query, that ``takes``. q: [num_q_tokens,
    num_q_heads, head_dim], k_cmp: [num_windows, num_kv_heads, head_dim], contiguous; shares: of the rows of q
    over k_cmp, from ``fsa_core.kernels.compressed``.
    """
    tensors = (q, k_cmp, shares.max, shares.share, *windows.starts)
    ids, *of_importance = _replayed(tensors, problem, windows.sizes, blocks, with_importance)
    return Selection(ids, *(of_importance or (None, None)))


def _forward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    sizes: tuple[int, int, int],
    blocks: Blocks,
    with_importance: bool,
) -> None:
    """The answers of ``select_blocks_forward``, of operands, shares and starts of windows of ``sizes``."""
    p, (q, k_cmp, row_max, row_share, *starts) = problem, tensors
    windows = Windows.of(sizes, starts)
    rows = (p.num_kv_heads, p.num_q_tokens)
    ids = memory.answer(*rows, blocks.top_k, dtype=torch.int32)
    importance, total = row_max, row_max
    if with_importance:
        importance = memory.answer(*ids.shape, dtype=torch.float32)
        total = memory.answer(*rows, dtype=torch.float32)
    elif hopper.runs_on(q.device) and _launch_on_hopper(p, windows, blocks, tensors, ids):
        return
    tile, is_float32 = _tile(p, windows, blocks), p.dtype == torch.float32
    _select[p.num_q_tokens // tile.tokens + p.num_sequences, p.num_kv_heads](
        q, k_cmp, row_max, row_share, ids, importance, total, *starts, p.softmax_scale * LOG2_E.value,
        p.num_q_tokens, p.num_sequences, search_steps(p.num_sequences), **_constants(p, windows, blocks),
        HEAD_DIM_PADDED=padded_dim(p.head_dim), TOKENS=tile.tokens, BLOCKS=tile.blocks,
        BY_THREAD=blocks.top_k <= MOST_BY_THREAD, STAGES=1 if is_float32 else 2, KEEP_KEYS=not is_float32,
        WITH_IMPORTANCE=with_importance, num_warps=4,
    )  # fmt: skip


_replayed = Replayed(_forward)


def _launch_on_hopper(
    problem: Problem,
    windows: Windows,
    blocks: Blocks,
    tensors: tuple[torch.Tensor, ...],
    ids: torch.Tensor,
) -> bool:
    """Launches the kernel for Hopper alone, if it takes the problem, and says so."""
    from fsa_core.kernels import hopper_selection as kernels

    p, (q, k_cmp, row_max, row_share, *starts) = problem, tensors
    if not kernels.takes(p, windows, blocks.block_size, blocks.top_k):
        return False
    num_tiles = p.num_q_tokens // kernels.TOKENS.value + p.num_sequences
    kernels.select[(min(multiprocessors(q.device), num_tiles * p.num_kv_heads),)](
        q, k_cmp, row_max, row_share, ids, *starts, p.softmax_scale * LOG2_E.value, p.num_q_tokens,
        p.num_sequences, search_steps(p.num_sequences), num_tiles, **_constants(p, windows, blocks),
        NUM_GIVEN=kernels.num_given(windows, blocks.block_size),
        STAGES=kernels.stages(p, windows, blocks.block_size), num_warps=4,
    )  # fmt: skip
    return True


def _constants(problem: Problem, windows: Windows, blocks: Blocks) -> dict[str, int]:
    """What both kernels have compiled into them."""
    p = problem
    return {
        "NUM_Q_HEADS": p.num_q_heads, "NUM_KV_HEADS": p.num_kv_heads, "GROUP_SIZE": p.group_size,
        "HEAD_DIM": p.head_dim, "KERNEL_SIZE": windows.kernel_size, "STRIDE": windows.stride,
        "BLOCK_SIZE": blocks.block_size, "TOP_K": blocks.top_k, "SLOTS": power_of_two(blocks.top_k),
        "NUM_FIRST": blocks.num_first_blocks, "NUM_LOCAL": blocks.num_local_blocks,
    }  # fmt: skip


def takes(problem: Problem, windows: Windows, blocks: Blocks) -> bool:
    """Whether a step's keys fit shared memory, and the best blocks of the fewest tokens the registers."""
    few_blocks = MIN_BLOCKS * _block_bytes(problem, windows, blocks)
    return few_blocks <= _step_bytes(problem) and MIN_TOKENS * power_of_two(blocks.top_k) <= MAX_HELD


def _tile(problem: Problem, windows: Windows, blocks: Blocks) -> Tile:
    most_tokens = MAX_TOKENS // 2 if problem.dtype == torch.float32 else MAX_TOKENS
    at_once = _step_bytes(problem) // _block_bytes(problem, windows, blocks)
    return Tile(
        tokens=min(MAX_HELD // power_of_two(blocks.top_k), most_tokens),
        blocks=min(1 << (at_once.bit_length() - 1), MAX_BLOCKS),
    )


def _step_bytes(problem: Problem) -> int:
    return STEP_BYTES_FLOAT32 if problem.dtype == torch.float32 else STEP_BYTES


def _block_bytes(problem: Problem, windows: Windows, blocks: Blocks) -> int:
    """Of the keys of all windows that begin in a block."""
    num_windows = blocks.block_size // windows.stride
    return num_windows * padded_dim(problem.head_dim) * problem.dtype.itemsize

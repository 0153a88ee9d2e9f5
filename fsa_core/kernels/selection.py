"""Which blocks compressed attention finds important: probabilities and the best blocks stay on the chip.

A program takes a few consecutive tokens of one sequence under one KV head and walks its blocks of keys from
the last to the first. Scores are computed again from q and the compressed keys, one query head after another;
with the maximum and the sum of each row known (``fsa_core.kernels.compressed``) they become probabilities at
once. The windows of a block are columns of different products: window r * j + o of block j is column j of the
product for offset o, so that a block's importance is a sum of products, number by number, and nothing moves
between threads. The best blocks so far are a set in registers; each step takes the best of the new blocks,
one a token at a time, until none beats the worst in the set: after a few steps there are hardly any.

Importance and id are packed into one integer, so that of equals the lower id is better and the order in which
blocks come does not matter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import LOG2_E
from fsa_core.kernels.query_tiles import load_block
from fsa_core.kernels.windows import RowShares, Windows, last_tiles_first, visible_windows
from fsa_core.plan import padded_dim, power_of_two, search_steps
from fsa_core.problem import Problem

# A candidate is an int64: the bits of its importance, a float32 that is never negative, above its id, counted
# down from the highest. What is not forced lies below zero.
NOT_FORCED = tl.constexpr(-0x7F800001)
MAX_ID = tl.constexpr((1 << 31) - 1)
# The least candidate, under which lie unused slots; what is under all of them, and what is above all.
LEAST = tl.constexpr(-0x7F800001 * (1 << 32))
NONE = tl.constexpr(-(1 << 63))
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
    OFFSET: tl.constexpr,
    ROW: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CUT: tl.constexpr,
    MASK_DIMS: tl.constexpr,
):
    """[dim, BLOCKS]: of every block, the key of the window that is ``OFFSET`` after its first.

    Before the first window of all it is another's; past the last, where CUT says some may be, it is zeros.
    """
    window = tl.arange(0, BLOCKS) * PER_BLOCK + OFFSET
    if OFFSET < 0:
        window = tl.maximum(window, -first_window)
    exists = (window < num_windows - first_window)[None, :]
    k_ptrs = k_ptr + first_window.to(tl.int64) * ROW
    k_ptrs += (window * ROW)[None, :] + tl.arange(0, dim_mask.shape[0])[:, None]
    return load_block(k_ptrs, exists, dim_mask[:, None], CUT, MASK_DIMS)


@triton.jit
def _importance(
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
    """float32 [tokens, BLOCKS], of the group's heads one after another. CUT: some windows are not seen."""
    num_tokens: tl.constexpr = q_mask.shape[0]
    mask_dims: tl.constexpr = dim_mask.shape[0] != HEAD_DIM
    keys = ()
    if KEEP_KEYS:
        for i in tl.static_range(PER_BLOCK + BEFORE):
            some = _window_keys(
                k_ptr, first_window, num_windows, dim_mask, i - BEFORE, ROW, BLOCKS, PER_BLOCK, CUT, mask_dims
            )
            # Triton knows no starred expression.
            keys = keys + (some,)  # type: ignore[assignment]  # noqa: RUF005
    first = first_window + tl.arange(0, BLOCKS) * PER_BLOCK
    importance = tl.zeros((num_tokens, BLOCKS), tl.float32)
    for head in tl.range(0, GROUP_SIZE, num_stages=STAGES):
        q = tl.load(q_ptrs + head * HEAD_DIM, mask=q_mask, other=0.0)
        head_rows = head * tl.cast(num_q_tokens, tl.int64)
        row_max = tl.load(row_max_ptrs + head_rows, mask=token_mask, other=0.0)
        row_share = tl.load(row_share_ptrs + head_rows, mask=token_mask, other=0.0)
        # The weights of a block are added before they are divided: sums of powers of two are exact.
        total = tl.zeros((num_tokens, BLOCKS), tl.float32)
        for i in tl.static_range(PER_BLOCK + BEFORE):
            if not KEEP_KEYS:
                some = _window_keys(
                    k_ptr, first_window, num_windows, dim_mask, i - BEFORE, ROW, BLOCKS, PER_BLOCK, CUT,
                    mask_dims,
                )  # fmt: skip
            else:
                some = keys[i]
            scores = tl.dot(q, some, input_precision="tf32x3")
            weights = tl.exp2(scores * scale - row_max[:, None])
            windows = first + (i - BEFORE)
            if CUT:
                seen = (windows[None, :] >= 0) & (windows[None, :] < visible[:, None])
                weights = tl.where(seen, weights, 0.0)
            elif i < BEFORE:
                weights = tl.where(windows[None, :] >= 0, weights, 0.0)
            # The strides that such a window shares with the block.
            shared = (i + 1 if i < PER_BLOCK else PER_BLOCK) - (i - BEFORE if i > BEFORE else 0)
            total += weights * shared
        importance += total * row_share[:, None]
    return tl.where(importance == importance, importance, 0.0)


@triton.jit
def _in_order(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _keep_best(
    best, importance, first_block, own, NUM_FIRST: tl.constexpr, NUM_LOCAL: tl.constexpr, CUT: tl.constexpr
):
    """The best of ``best`` [tokens, slots], packed and unordered, and of more blocks.

    importance: float32 [tokens, blocks], of the blocks from ``first_block`` on. CUT: some lie behind a token.
    """
    num_tokens: tl.constexpr = importance.shape[0]
    quarter: tl.constexpr = importance.shape[1] // 4
    block = first_block + tl.arange(0, importance.shape[1])[None, :]
    is_forced = (block < NUM_FIRST) | (block > own[:, None] - NUM_LOCAL)
    bits = importance.to(tl.int32, bitcast=True)
    packed = (tl.where(is_forced, bits, bits + NOT_FORCED).to(tl.int64) << 32) | (MAX_ID - block)
    if CUT:
        packed = tl.where(block <= own[:, None], packed, NONE)
    # Lists of four, the best first: then only their heads have to be looked through. A thread has all four.
    lists = tl.trans(tl.reshape(packed, (num_tokens, 4, quarter)), (0, 2, 1))
    even, odd = tl.split(tl.reshape(lists, (num_tokens, quarter, 2, 2)))
    head, third = tl.split(even)
    second, fourth = tl.split(odd)
    head, second = _in_order(head, second)
    third, fourth = _in_order(third, fourth)
    head, third = _in_order(head, third)
    second, fourth = _in_order(second, fourth)
    second, third = _in_order(second, third)
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
    step_windows: tl.constexpr = BLOCKS * per_block
    num_steps = (tl.max(own, 0) + BLOCKS) // BLOCKS
    num_whole = visible_windows(first + q_shift, KERNEL_SIZE, STRIDE) // step_windows
    slot = tl.arange(0, SLOTS)
    unused = tl.where(slot < TOP_K, LEAST - 1 - slot.to(tl.int64), FULL)
    # A row without a query takes nothing, and so keeps no other row waiting.
    best = tl.where(token_mask[:, None], unused[None, :], FULL)
    row_total = tl.zeros((TOKENS,), tl.float32)
    # The last blocks, whose windows some tokens do not see, and then those before them.
    for i in tl.range(0, num_steps - num_whole, num_stages=1):
        first_block = (num_steps - 1 - i) * BLOCKS
        first_window = first_block * per_block
        importance = _importance(
            q_ptrs, q_mask, k_ptr, row_max_ptrs, row_share_ptrs, token_mask, dim_mask, num_q_tokens,
            first_window, num_windows, visible, scale, HEAD_DIM, key_row, GROUP_SIZE, BLOCKS, per_block,
            before, STAGES, KEEP_KEYS, True,
        )  # fmt: skip
        if WITH_IMPORTANCE:
            row_total += tl.sum(importance, 1)
        best = _keep_best(best, importance, first_block, own, NUM_FIRST, NUM_LOCAL, True)
    for i in tl.range(0, num_whole, num_stages=1):
        first_block = (num_whole - 1 - i) * BLOCKS
        first_window = first_block * per_block
        importance = _importance(
            q_ptrs, q_mask, k_ptr, row_max_ptrs, row_share_ptrs, token_mask, dim_mask, num_q_tokens,
            first_window, num_windows, visible, scale, HEAD_DIM, key_row, GROUP_SIZE, BLOCKS, per_block,
            before, STAGES, KEEP_KEYS, False,
        )  # fmt: skip
        if WITH_IMPORTANCE:
            row_total += tl.sum(importance, 1)
        best = _keep_best(best, importance, first_block, own, NUM_FIRST, NUM_LOCAL, False)

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
    p, tile = problem, _tile(problem, windows, blocks)
    is_float32 = p.dtype == torch.float32
    rows = (p.num_kv_heads, p.num_q_tokens)
    ids = torch.empty(*rows, blocks.top_k, dtype=torch.int32, device=q.device)
    importance, total = None, None
    if with_importance:
        importance = torch.empty(ids.shape, dtype=torch.float32, device=q.device)
        total = torch.empty(rows, dtype=torch.float32, device=q.device)
    _select[p.num_q_tokens // tile.tokens + p.num_sequences, p.num_kv_heads](
        q, k_cmp, shares.max, shares.share, ids, shares.max if importance is None else importance,
        shares.max if total is None else total, *windows.starts, p.softmax_scale * LOG2_E.value,
        p.num_q_tokens, p.num_sequences, search_steps(p.num_sequences), NUM_Q_HEADS=p.num_q_heads,
        NUM_KV_HEADS=p.num_kv_heads, GROUP_SIZE=p.group_size, HEAD_DIM=p.head_dim,
        HEAD_DIM_PADDED=padded_dim(p.head_dim), KERNEL_SIZE=windows.kernel_size, STRIDE=windows.stride,
        BLOCK_SIZE=blocks.block_size, TOP_K=blocks.top_k, SLOTS=power_of_two(blocks.top_k),
        NUM_FIRST=blocks.num_first_blocks, NUM_LOCAL=blocks.num_local_blocks, TOKENS=tile.tokens,
        BLOCKS=tile.blocks, STAGES=1 if is_float32 else 2, KEEP_KEYS=not is_float32,
        WITH_IMPORTANCE=with_importance, num_warps=4,
    )  # fmt: skip
    return Selection(ids, importance, total)


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
    """Of the keys of all windows that overlap a block."""
    num_windows = (blocks.block_size + windows.kernel_size) // windows.stride - 1
    return num_windows * padded_dim(problem.head_dim) * problem.dtype.itemsize

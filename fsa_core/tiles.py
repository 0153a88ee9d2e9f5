"""Tiles: their measured sizes, and what follows for a problem; arithmetic, before anything runs."""

from dataclasses import dataclass

import torch

from fsa_core.problem import Problem
from fsa_core.sizes import INT32_BYTES, padded_dim, power_of_two

# Which of a query tile's tokens chose a block.
MASK_BYTES = 8
# A query tile sorts its ids in registers; its tokens are the bits of an int64.
MAX_SORTED = 1024
# Of a tile's list beside its entries: how many are whole, how many there are, its place in the order, and its
# share of where classes begin.
LIST_INTS = 4
MAX_TILE_TOKENS = 64
# A tile that may leave something attends all its blocks if it would leave less than one choice in so many and
# if they are no more than so many times the slots of a token: as many as tokens choose that agree at all.
FEW_LEFT = 2
MOST_BLOCKS_A_SLOT = 4
# A thread has no more; results of a product that take so many leave a lower limit no room.
MAX_REGISTERS = 255
MANY_REGISTERS = 128
# The fewest rows that a matrix product takes, and so of any tile.
MIN_ROWS = 16


@dataclass(frozen=True, slots=True)
class PartialTuning:
    """Measured sizes of the partial kernel: rows of a tile, tiles of a work item, what a program may take."""

    rows: int
    tiles_per_item: int
    num_warps: int
    max_registers: int


@dataclass(frozen=True, slots=True)
class SharedTuning:
    """Sizes of query tiles. If they leave something, a block is shared if 1 in ``shared_by`` tokens chose it.

    And all blocks of a tile are, if less than 1 in FEW_LEFT choices of its tokens would be left and the
    blocks are no more than MOST_BLOCKS_A_SLOT times the slots.
    """

    rows: int
    num_warps: int
    max_registers: int
    num_stages: int
    shared_by: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a plan takes from measurements; everything else in it follows from the problem."""

    partial: PartialTuning
    shared: SharedTuning


@dataclass(frozen=True, slots=True)
class TileShape:
    """Tiles of the partial kernel; what decides the order of additions depends on head dims and dtype.

    A tile is as many whole (token, slot) pairs, with their query heads, as ``rows`` hold.
    """

    rows: int
    pairs: int
    keys: int
    tiles_per_item: int
    num_warps: int
    max_registers: int

    @property
    def pairs_per_item(self) -> int:
        return self.pairs * self.tiles_per_item


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Tiles of consecutive tokens that attend what they share; shaped by heads, dims and slots alone.

    A tile is ``tokens`` tokens with the query heads of one tile head, in ``rows`` rows. The blocks that at
    least ``min_tokens`` of them chose are shared, or all, up to ``most_blocks``, where few choices are left:
    at most ``max_shared``. ``is_row``: they share a row of indices, and so all that it has. ``is_half``: a
    kernel may be there that takes tiles two by two, and joins their lists.
    """

    tokens: int
    rows: int
    keys: int
    min_tokens: int
    most_blocks: int
    max_shared: int
    is_row: bool
    is_half: bool
    num_warps: int
    max_registers: int
    num_stages: int

    @property
    def list_bytes(self) -> int:
        """Blocks, the masks of their tokens and what is beside; and half of two lists' joint one."""
        listed = self.max_shared * (INT32_BYTES + MASK_BYTES) + LIST_INTS * INT32_BYTES
        return listed + self.joined_bytes

    @property
    def joined_bytes(self) -> int:
        """Half of two lists' joint one, where there are any. A list that is alone in one takes all of it."""
        return (self.max_shared * (INT32_BYTES + 2 * MASK_BYTES) + INT32_BYTES) * self.is_half


def default_tuning(problem: Problem) -> Tuning:
    """What is taken where nothing was measured; as measured on an H200 at D = 128, see docs/kernels.md.

    Partials: 64 rows beat 32 and 128, 4 tiles an item beat fewer and more, and 4 warps beat 8 until the
    accumulator outgrows their registers. The limit on registers lets four programs share a multiprocessor
    instead of three; pipelined loads cost more room than they won. Query tiles: 128 rows win from 8 heads a
    token on.

    Products of float32 in three parts take the registers and the shared memory of three. Query tiles of
    float32 have 4 warps: Triton 3.6 gives wrong products of 64 rows and 16 keys to 8.
    """
    is_float32 = problem.dtype == torch.float32
    is_narrow = _is_narrow(problem)
    num_warps = 4 if is_narrow and not is_float32 else 8
    if is_float32:
        shared = SharedTuning(64, num_warps=4, max_registers=MAX_REGISTERS, num_stages=1, shared_by=3)
    elif is_narrow and problem.heads_per_pair >= 8:
        shared = SharedTuning(128, num_warps=8, max_registers=128, num_stages=2, shared_by=3)
    else:
        stages = 3 if is_narrow else 2
        shared = SharedTuning(64, num_warps, max_registers=MAX_REGISTERS, num_stages=stages, shared_by=3)
    max_registers = MAX_REGISTERS if is_float32 else 128
    return Tuning(
        PartialTuning(64, tiles_per_item=4, num_warps=num_warps, max_registers=max_registers), shared
    )


def partial_tile(problem: Problem, tuning: PartialTuning, most_keys: int = 128) -> TileShape:
    """With all keys of a block, if they fit beside the rest: what a tile loads again takes its time."""
    if problem.dtype == torch.float32:
        most_keys = min(most_keys, 32)
    elif not _is_narrow(problem):
        most_keys = min(most_keys, 64)
    rows = max(tuning.rows, power_of_two(problem.heads_per_pair))
    keys = min(problem.block_size, most_keys)
    # A limit leaves no room for long results (a score and a weight beside each other), nor for addresses of
    # the keys that come later.
    numbers = rows * max(padded_dim(problem.value_dim), 2 * keys) // (32 * tuning.num_warps)
    is_limited = numbers < MANY_REGISTERS and keys == problem.block_size
    return TileShape(
        rows=rows,
        pairs=rows // problem.heads_per_pair,
        keys=keys,
        tiles_per_item=tuning.tiles_per_item,
        num_warps=tuning.num_warps,
        max_registers=tuning.max_registers if is_limited else MAX_REGISTERS,
    )


def row_tile_tokens(problem: Problem, tuning: SharedTuning) -> int:
    """Tokens of a query tile that lies in one row of indices, which they share.

    0 where those that share a row cannot be cut into tiles that have more than half of what fills one.
    """
    full, shared = _full_tile_tokens(problem, tuning), problem.query_block_size
    if shared == 1:
        return 0
    tokens = max(n for n in range(1, full + 1) if shared % n == 0)
    return tokens if 2 * tokens > full else 0


def _full_tile_tokens(problem: Problem, tuning: SharedTuning) -> int:
    return max(min(tuning.rows // problem.heads_per_pair, MAX_TILE_TOKENS), 1)


def query_tile(problem: Problem, tuning: SharedTuning, *, leaves_nothing: bool) -> QueryTile:
    """As many tokens as the rows hold, unless there are more slots than a program sorts at once."""
    row_tokens = row_tile_tokens(problem, tuning) if leaves_nothing else 0
    tokens = row_tokens or _full_tile_tokens(problem, tuning)
    while not row_tokens and tokens > 1 and power_of_two(tokens) * slot_class(problem.num_slots) > MAX_SORTED:
        tokens //= 2
    min_tokens = 1 if leaves_nothing else -(-tokens // tuning.shared_by)
    pairs = tokens * problem.num_slots
    most_blocks = MOST_BLOCKS_A_SLOT * slot_class(problem.num_slots)
    return QueryTile(
        tokens=tokens,
        rows=max(tuning.rows, power_of_two(problem.heads_per_pair)),
        keys=min(problem.block_size, 32 if problem.dtype == torch.float32 else 64),
        min_tokens=min_tokens,
        most_blocks=most_blocks,
        max_shared=problem.num_slots if row_tokens else max(pairs // min_tokens, min(most_blocks, pairs)),
        is_row=row_tokens > 0,
        # With more heads a tile of twice as many rows has no more tokens than are sorted fast.
        is_half=problem.heads_per_pair <= 2 and _fills(problem, tokens, tuning.rows) and not row_tokens,
        num_warps=tuning.num_warps,
        max_registers=tuning.max_registers,
        num_stages=tuning.num_stages,
    )


def _fills(problem: Problem, tokens: int, rows: int) -> bool:
    """Whether so many tokens fill a tile of 64 rows."""
    return tokens * problem.heads_per_pair == rows == 64


def _is_narrow(problem: Problem) -> bool:
    return max(padded_dim(problem.head_dim), padded_dim(problem.value_dim)) <= 128


def slot_class(num_slots: int) -> int:
    """All that a choice, and what a tile shares, may depend on of the slots in a row of block indices.

    A power of two from 16 up, so that requests of one class, packed with the longest of their rows, are
    answered as each would be alone. Up to 16 slots bound no query tile.
    """
    return max(power_of_two(num_slots), MAX_SORTED // MAX_TILE_TOKENS)

"""How a call is cut into chunks, and the workspace it takes: arithmetic, before anything runs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from fsa_core.problem import MAX_SLOTS, Problem
from fsa_core.sizes import FLOAT32_BYTES, INT32_BYTES, equal_parts, power_of_two
from fsa_core.tiles import (
    LIST_INTS,
    MASK_BYTES,
    MAX_SORTED,
    MIN_ROWS,
    QueryTile,
    TileShape,
    Tuning,
    default_tuning,
    partial_tile,
    query_tile,
)

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
# More is not used: kernels count the pairs and the counters of a group in 32 bits.
MAX_WORKSPACE_BYTES = 2**31

# KV blocks outside and the tokens that chose them inside; or tiles of neighbouring tokens outside and the
# blocks that any of them chose inside; or tiles with the blocks that many of them chose, and with the rest KV
# blocks again, or each token by itself.
KV_MAJOR, QUERY_TILE, MIXED, TOKEN_MAJOR = "kv_major", "query_tile", "mixed", "token_major"
PATHS = (KV_MAJOR, QUERY_TILE, MIXED, TOKEN_MAJOR)

# Atomics on one line of the L2 cache wait for each other. A counter of the index has a line to itself or,
# where these would take much of the workspace, a sector of 32 bytes.
LINE_INTS, SECTOR_INTS = 32, 8
MAX_LINES = 4096
# A (token of a chunk, slot) pair is packed into one int32.
SLOT_BITS = (MAX_SLOTS - 1).bit_length()
MAX_CHUNK_TOKENS = 1 << (31 - SLOT_BITS)
MIN_CHUNK_TOKENS = 16
# Kernels count numbers from a chunk's first in 32 bits.
MAX_CHUNK_NUMBERS = 2**31 - 1
# More partials at a time win nothing (measured up to 192 MiB); fewer leave tiles of random indices empty.
# Room for 8192 tokens of 4 heads of 128 channels, with 16 slots.
PARTIAL_BYTES = 130 * 2**20
# Both, where chunks take turns in two buffers.
BUFFERED_BYTES = 160 * 2**20
# There small problems are cut as well, but not smaller than this.
CHUNKS_AT_LEAST = 4
# Of their tiles; and how many slots a word has bits for.
BUFFERED_ROWS, USED_BITS = 64, 32
# Of a work item there, what the kernel has to know of it.
RECORD_INTS = 4
MIN_BUFFER_BYTES = 16 * 2**20
# How many tiles are put in order at a time, by as many classes of how much they walk.
ORDERED_TILES, STEP_BINS = 2048, 256


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Selected attention, forward: an index for a group of tokens and heads at a time, attended in chunks.

    A tile head is the unit that owns a list of selected blocks and the query heads that share it: a KV
    head, or a query head when each query head selects for itself. ``heads_per_pair`` query heads ride
    with every (token, slot) pair. A chunk is ``chunk_tokens`` query tokens under ``chunk_heads`` tile heads,
    a group a whole number of chunks: ``group_tokens`` under ``group_heads``. Chunks take turns in ``buffers``
    of partials, where a kernel merges one while it attends the next (``is_buffered``); which slots of a token
    have partials it reads in ``used_words``. ``query_tile`` is None on the KV-major path; without partials
    there are no chunks, no index and no work items.
    """

    path: str
    query_tile: QueryTile | None
    extra_tiles: int

    tile_heads: int
    heads_per_pair: int
    tile_heads_per_kv_head: int
    chunk_tokens: int
    chunk_heads: int
    buffers: int
    is_buffered: bool
    group_tokens: int
    group_heads: int
    index_per_head: bool
    segments: int
    used_words: int
    max_items: int
    tile: TileShape
    workspace_bytes: int

    @property
    def group_chunks(self) -> int:
        return -(-self.group_tokens // self.chunk_tokens)

    @property
    def has_partials(self) -> bool:
        return _has_partials(self.path)

    @property
    def has_leftover(self) -> bool:
        """Whether query tiles leave something of block_indices."""
        return self.path in (MIXED, TOKEN_MAJOR)

    @property
    def group_tiles(self) -> int:
        """An upper bound of the query tiles that meet a group."""
        if self.query_tile is None:
            return 0
        return -(-self.group_tokens // self.query_tile.tokens) + self.extra_tiles


# A training loop asks for the same plan again and again, and making it costs the host 20 microseconds.
@lru_cache(maxsize=1024)
def plan_forward(
    problem: Problem,
    limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
    path: str = KV_MAJOR,
    tuning: Tuning | None = None,
    buffers: int = 1,
) -> ForwardPlan:
    """The largest chunks and groups that ``limit_bytes`` of workspace allows, fewest tile heads first.

    Many tokens of one head rather than few of all: the head's K/V stays in the L2 cache, and the blocks'
    lists of tokens are long, so that tiles are full. At least 16 tokens (or all) ride in a chunk,
    whatever the limit. ``tuning``: that of ``default_tuning`` if there is none. ``buffers``: 2 where a kernel
    merges a chunk while it attends the next.

    Raises:
        ValueError: the path cannot take the problem (see ``takes``).
    """
    p = problem
    limit_bytes = min(limit_bytes, MAX_WORKSPACE_BYTES)
    tuning = tuning or default_tuning(p)
    if not takes(p, path):
        raise ValueError(
            f"path {path!r} sorts blocks in 32 bits and cannot take {p.num_k_tokens} keys in blocks of "
            f"{p.block_size} with {p.num_slots} slots; path {KV_MAJOR!r} can"
        )
    tile_heads = max(p.index_heads, p.num_kv_heads)
    heads_per_pair = p.heads_per_pair
    tile = partial_tile(p, tuning.partial)
    leaves_nothing = path == QUERY_TILE
    walked = None if path == KV_MAJOR else query_tile(p, tuning.shared, leaves_nothing=leaves_nothing)
    list_bytes = 0 if walked is None else walked.list_bytes
    tile_tokens = 1 if walked is None else walked.tokens
    pair_bytes = heads_per_pair * (p.value_dim * p.dtype.itemsize + FLOAT32_BYTES)
    # What a token takes at once, and what it takes as long as its group lasts: pairs, ranks, leftover ids.
    token_bytes = p.num_slots * pair_bytes if _has_partials(path) else 0
    held_ints = {KV_MAJOR: 2, MIXED: 3, TOKEN_MAJOR: 1, QUERY_TILE: 0}[path] * p.num_slots
    held_bytes = INT32_BYTES * held_ints + -(-list_bytes // tile_tokens)
    partial_limit = _partial_limit(limit_bytes)
    is_buffered = buffers > 1 and tile.rows == BUFFERED_ROWS and tile.keys == p.block_size
    used_words = -(-p.num_slots // USED_BITS) if is_buffered and _has_partials(path) else 0
    held_bytes += INT32_BYTES * used_words
    if is_buffered:
        all_bytes = p.num_q_tokens * tile_heads * token_bytes
        partial_limit = min(limit_bytes * 11 // 16, BUFFERED_BYTES) // buffers
        partial_limit = min(partial_limit, max(all_bytes // CHUNKS_AT_LEAST, MIN_BUFFER_BYTES))
    chunk_tokens = min(partial_limit // max(token_bytes, 1), limit_bytes // 4 // held_bytes)
    partials = p.num_slots * heads_per_pair * p.value_dim if _has_partials(path) else 0
    most_tokens = MAX_CHUNK_NUMBERS // max(partials, p.num_q_heads * max(p.head_dim, p.value_dim))
    chunk_tokens = min(max(chunk_tokens, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS, most_tokens, p.num_q_tokens)
    # Equal chunks: a short last one would leave its tiles empty.
    chunk_tokens = equal_parts(p.num_q_tokens, chunk_tokens)
    chunk_heads = min(max(partial_limit // max(chunk_tokens * token_bytes, 1), 1), tile_heads)
    if p.index_heads > 1:
        chunk_heads = min(chunk_heads, max(limit_bytes // 4 // (chunk_tokens * held_bytes), 1))
    chunk_heads = equal_parts(tile_heads, chunk_heads)
    is_one_chunk = chunk_tokens == p.num_q_tokens and chunk_heads == tile_heads
    buffers = 1 if is_one_chunk or not is_buffered else buffers
    partial_bytes = buffers * chunk_heads * chunk_tokens * token_bytes
    if is_buffered:
        # Programs take as many tiles each, whichever blocks these are of.
        tile = replace(tile, tiles_per_item=1)
    max_items = _max_items(p, chunk_tokens, tile)
    index_ints = chunk_tokens * (held_ints + used_words)
    if _has_partials(path):
        item_ints = max_items * (RECORD_INTS if is_buffered else 1)
        index_ints += (counter_ints(num_segments(p)) + 2) * num_segments(p) + 2 + item_ints
    # Sequences start tiles of their own, and a group's borders cut two more; they may have no neighbour.
    extra_tiles = p.num_sequences + 2
    extra_bytes = 0
    if walked is not None:
        extra_bytes = extra_tiles * list_bytes + (extra_tiles + 1) * walked.joined_bytes
        extra_bytes += STEP_BINS * INT32_BYTES
    index_limit = limit_bytes - partial_bytes - extra_bytes * p.index_heads
    index_per_head = p.index_heads > 1
    chunk_index_bytes = index_ints * INT32_BYTES + -(-chunk_tokens // tile_tokens) * list_bytes
    chunk_index_bytes *= chunk_heads if index_per_head else 1
    head_chunks = -(-tile_heads // chunk_heads) if index_per_head else 1
    group_head_chunks = min(max(index_limit // chunk_index_bytes, 1), head_chunks)
    group_index_bytes = group_head_chunks * chunk_index_bytes
    token_chunks = -(-p.num_q_tokens // chunk_tokens)
    group_token_chunks = min(max(index_limit // group_index_bytes, 1), token_chunks)
    group_heads = min(group_head_chunks * chunk_heads, tile_heads) if index_per_head else tile_heads
    list_heads = group_heads if index_per_head else 1
    return ForwardPlan(
        path=path,
        query_tile=walked,
        extra_tiles=extra_tiles,
        tile_heads=tile_heads,
        heads_per_pair=heads_per_pair,
        tile_heads_per_kv_head=tile_heads // p.num_kv_heads,
        chunk_tokens=chunk_tokens,
        chunk_heads=chunk_heads,
        buffers=buffers,
        is_buffered=is_buffered,
        group_tokens=group_token_chunks * chunk_tokens,
        group_heads=group_heads,
        index_per_head=index_per_head,
        segments=num_segments(p),
        used_words=used_words,
        max_items=max_items,
        tile=tile,
        workspace_bytes=partial_bytes + group_token_chunks * group_index_bytes + extra_bytes * list_heads,
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Query tokens and tile heads that are indexed together; their index heads in block_indices."""

    first_token: int
    num_tokens: int
    first_head: int
    num_heads: int
    first_index_head: int
    num_index_heads: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Query tokens and tile heads that are attended together.

    ``number`` is that of the chunk's tokens in their group, ``first_index_head`` counts in the group's index.
    """

    number: int
    first_token: int
    num_tokens: int
    first_head: int
    num_heads: int
    first_index_head: int


def groups(problem: Problem, plan: ForwardPlan) -> Iterator[Group]:
    for first_head in range(0, plan.tile_heads, plan.group_heads):
        num_heads = min(plan.group_heads, plan.tile_heads - first_head)
        for first_token in range(0, problem.num_q_tokens, plan.group_tokens):
            num_tokens = min(plan.group_tokens, problem.num_q_tokens - first_token)
            index = (first_head, num_heads) if plan.index_per_head else (0, 1)
            yield Group(first_token, num_tokens, first_head, num_heads, *index)


def chunks(plan: ForwardPlan, group: Group) -> Iterator[Chunk]:
    """The chunks of a group: all those of the same heads before the next heads."""
    last_head = group.first_head + group.num_heads
    for first_head in range(group.first_head, last_head, plan.chunk_heads):
        num_heads = min(plan.chunk_heads, last_head - first_head)
        for number, start in enumerate(range(0, group.num_tokens, plan.chunk_tokens)):
            num_tokens = min(plan.chunk_tokens, group.num_tokens - start)
            index_head = first_head - group.first_head if plan.index_per_head else 0
            yield Chunk(number, group.first_token + start, num_tokens, first_head, num_heads, index_head)


def workspace_bytes(problem: Problem, limit_bytes: int = DEFAULT_WORKSPACE_BYTES) -> int:
    """Device memory beyond its inputs and outputs that the call takes at most, on any path, however tuned.

    Within ``limit_bytes``, unless the KV blocks or a single chunk of all heads are too many for it.
    """
    p = problem
    if p.is_dense or p.num_q_tokens == 0:
        return 0
    tile_heads = max(p.index_heads, p.num_kv_heads)
    index_heads = tile_heads if p.index_heads > 1 else 1
    pair_bytes = p.heads_per_pair * (p.value_dim * p.dtype.itemsize + FLOAT32_BYTES)
    # Of a token: the mixed path's, if its tiles share whatever any of their tokens chose, in the least items.
    # Lists of two tiles are joined.
    joined_bytes = (INT32_BYTES + 2 * MASK_BYTES) * (p.heads_per_pair <= 2)
    entry_bytes = INT32_BYTES + MASK_BYTES + joined_bytes
    listed_bytes = entry_bytes * p.num_slots + (LIST_INTS + 1) * INT32_BYTES
    items = -(-p.num_slots // max(MIN_ROWS // p.heads_per_pair, 1))
    held_ints = 3 * p.num_slots + RECORD_INTS * items + -(-p.num_slots // USED_BITS)
    held_bytes = INT32_BYTES * held_ints + listed_bytes
    list_bytes = (entry_bytes + joined_bytes) * max(MAX_SORTED, p.num_slots) + (LIST_INTS + 2) * INT32_BYTES
    fixed_ints = (counter_ints(num_segments(p)) + 2 + RECORD_INTS) * num_segments(p) + 2 + STEP_BINS
    fixed_bytes = INT32_BYTES * fixed_ints
    fixed_bytes = index_heads * (fixed_bytes + (p.num_sequences + 3) * list_bytes)
    all_held = p.num_q_tokens * index_heads * held_bytes
    # Two equal chunks have up to a token more than there are.
    all_partials = (p.num_q_tokens + 1) * tile_heads * p.num_slots * pair_bytes
    is_one_chunk = p.num_q_tokens <= MAX_CHUNK_TOKENS and all_held <= limit_bytes // 4
    if is_one_chunk and all_partials <= _partial_limit(limit_bytes):
        if all_partials > MIN_BUFFER_BYTES:
            all_partials = max(all_partials, 2 * MIN_BUFFER_BYTES)
            fixed_bytes *= 2 * CHUNKS_AT_LEAST
        return all_partials + all_held + fixed_bytes
    least_tokens = min(MIN_CHUNK_TOKENS, p.num_q_tokens)
    least_bytes = least_tokens * (2 * p.num_slots * pair_bytes + held_bytes) + fixed_bytes
    # Chunks have up to 11/16 of the limit for partials, a quarter for what is held; items are few beside.
    return max(limit_bytes, limit_bytes * 15 // 16 + least_bytes)


def _has_partials(path: str) -> bool:
    return path in (KV_MAJOR, MIXED)


def _partial_limit(limit_bytes: int) -> int:
    return min(limit_bytes * 9 // 16, PARTIAL_BYTES)


def takes(problem: Problem, path: str) -> bool:
    """Whether ``path`` can take the problem: query tiles sort (block, token, slot) in an int32.

    The KV-major path takes every problem; the others 2 million blocks of keys with up to 1,024 slots.
    """
    p = problem
    blocks = p.num_k_tokens // p.block_size + 1
    return path == KV_MAJOR or max(MAX_SORTED, power_of_two(p.num_slots)) * blocks < 2**31


def num_segments(problem: Problem) -> int:
    """An upper bound of the KV blocks of all sequences, known without reading cu_seqlens."""
    return problem.num_k_tokens // problem.block_size + problem.num_sequences


def counter_ints(segments: int) -> int:
    """How many int32 a counter of the index has to itself."""
    return LINE_INTS if segments <= MAX_LINES else SECTOR_INTS


def _max_items(problem: Problem, tokens: int, tile: TileShape) -> int:
    """An upper bound of the work items of one tile head: full ones, and one that is not full a segment."""
    pairs = tokens * problem.num_slots
    return pairs // tile.pairs_per_item + min(num_segments(problem), pairs)

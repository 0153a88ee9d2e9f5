"""How the gradients of one call are cut into chunks, work items and tiles, and the workspace they take."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fsa_core.plan import (
    DEFAULT_WORKSPACE_BYTES,
    KV_MAJOR,
    MAX_CHUNK_NUMBERS,
    MAX_CHUNK_TOKENS,
    MAX_WORKSPACE_BYTES,
    MIN_CHUNK_TOKENS,
    MIXED,
    SLOT_BITS,
    TOKEN_MAJOR,
    ForwardPlan,
    num_segments,
    plan_forward,
)
from fsa_core.problem import Problem
from fsa_core.sizes import equal_parts, padded_dim, power_of_two
from fsa_core.tiles import MAX_REGISTERS, Tuning, default_tuning, partial_tile, row_tile_tokens

INT32_BYTES = 4
FLOAT32_BYTES = 4
# A strip of the index has so many pairs, or more, for each of its counters. Strips end where chunks do: there
# may be counters of a tile and of all segments more.
PAIRS_A_COUNTER = 3
TILE_PAIRS = 1024
# Pairs of a work item: twice what a block of 64 keys has on average, with 16 slots. Each item of a block that
# has several takes room for float32 gradients of the block: the longer a call, the longer its items.
ITEM_PAIRS = 2048
LONG_ITEM_PAIRS = 4096
LONGEST_ITEM_PAIRS = (4 * LONG_ITEM_PAIRS, 8 * LONG_ITEM_PAIRS)
# Rows of a tile that adds to gradients of keys, of 16 bits; of a query tile, unless a kernel takes more.
KEY_ROWS, QUERY_ROWS = 64, 64


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """The gradients of k and v: pairs are indexed by KV block, and a program walks those of one work item.

    ``kv_heads`` KV heads are indexed together and taken ``launch_heads`` at a time. Tokens are taken in
    chunks, and indexed in groups of whole chunks; where one chunk does not hold all that adds to a block,
    ``has_sums``: gradients are added up in float32, for ``range_segments`` KV blocks at a time.
    ``with_queries``: shares of grad_q are made as well. A work item is up to ``pairs_per_item`` pairs of one
    KV block. The blocks of a chunk that have more than one item have at most ``max_splits`` together. A
    program has ``tile_keys`` keys of a block and walks its pairs ``tile_pairs`` at a time, in ``tile_rows``
    rows. A pair's slot takes ``slot_bits`` of its 31 bits, and its token of the chunk the others.
    """

    with_queries: bool
    has_sums: bool
    kv_heads: int
    launch_heads: int
    chunk_tokens: int
    group_tokens: int
    range_segments: int
    pairs_per_item: int
    max_items: int
    max_splits: int
    tile_rows: int
    tile_pairs: int
    tile_keys: int
    num_warps: int
    num_stages: int
    slot_bits: int
    workspace_bytes: int


# Told apart by what they are: calls are looked up by their plan, and to hash all its numbers takes the host
# longer than to find them.
@dataclass(frozen=True, slots=True, eq=False)
class BackwardPlan:
    """Gradients under ``delta_heads`` KV heads at a time.

    Five matrix products where ``queries`` is None: the shares of grad_q come with the gradients of the keys.
    Else seven: grad_q is made apart, as the forward pass of a plan goes about it. ``at_once``: both parts are
    one to the host, each with memory of its own, where there is room for both. Other names as there.
    """

    delta_heads: int
    keys: KeyPlan
    queries: ForwardPlan | None
    at_once: bool
    tile_heads_per_kv_head: int
    index_per_head: bool
    segments: int
    workspace_bytes: int


def plan_backward(
    problem: Problem,
    limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
    path: str = KV_MAJOR,
    tuning: Tuning | None = None,
    query_rows: int = QUERY_ROWS,
    buffers: int = 1,
) -> BackwardPlan:
    """The largest chunks, ranges and groups that ``limit_bytes`` of workspace allows.

    At least 16 tokens (or all) ride in a chunk and one KV block in a range, whatever the limit. ``path`` and
    ``tuning`` are those of the forward pass, but for the sizes of tiles, which hold more here; query tiles of
    16 bits have ``query_rows`` rows. ``buffers``: as in ``plan_forward``, for shares of grad_q.

    Raises:
        ValueError: the path cannot take the problem (see ``plan.takes``).
    """
    # Which path the forward pass took does not matter here, and no kernel makes grad_q token by token.
    path = MIXED if path == TOKEN_MAJOR else path
    p = problem
    limit_bytes = min(limit_bytes, MAX_WORKSPACE_BYTES)
    head_delta_bytes = FLOAT32_BYTES * p.num_q_tokens * p.group_size
    delta_heads = min(max(limit_bytes // 8 // head_delta_bytes, 1), p.num_kv_heads)
    delta_heads = equal_parts(p.num_kv_heads, delta_heads)
    delta_bytes = delta_heads * head_delta_bytes
    room = max(limit_bytes - delta_bytes, limit_bytes // 2)
    sizes = _Sizes.of(p, delta_heads)
    queries, at_once = None, False
    # Measured on an H200: with all shares of grad_q in one chunk, five products are a third faster; in 3,
    # they take the same time; in 4 and more, seven are. Query tiles need no shares.
    keys = _in_one_chunk(sizes, room, ITEM_PAIRS, with_queries=True) if path == KV_MAJOR else None
    if keys is None:
        keys = (
            _in_one_chunk(sizes, room, ITEM_PAIRS, with_queries=False)
            or _in_one_chunk(sizes, room, LONG_ITEM_PAIRS, with_queries=False)
            or _in_one_chunk(sizes, room, LONGEST_ITEM_PAIRS[0], with_queries=False)
            or _in_one_chunk(sizes, room, LONGEST_ITEM_PAIRS[1], with_queries=False)
            or _in_chunks(sizes, room)
        )
        sizes_of_queries = _query_tuning(p, tuning or default_tuning(p), query_rows)
        # What the keys take is little but in long calls. Of many sequences there is more to list.
        at_once = keys.workspace_bytes <= room // 4
        if at_once:
            queries = _query_plan(p, room - keys.workspace_bytes, path, sizes_of_queries, buffers)
            at_once = keys.workspace_bytes + queries.workspace_bytes <= room
        if not at_once:
            queries = _query_plan(p, room, path, sizes_of_queries, buffers)
    query_bytes = 0 if queries is None else queries.workspace_bytes
    both_bytes = keys.workspace_bytes + query_bytes if at_once else max(keys.workspace_bytes, query_bytes)
    return BackwardPlan(
        delta_heads=delta_heads,
        keys=keys,
        queries=queries,
        at_once=at_once,
        tile_heads_per_kv_head=sizes.tile_heads_per_kv_head,
        index_per_head=p.index_heads > 1,
        segments=sizes.segments,
        workspace_bytes=delta_bytes + both_bytes,
    )


def _query_plan(problem: Problem, room_bytes: int, path: str, tuning: Tuning, buffers: int) -> ForwardPlan:
    """That of a forward pass whose values are as wide as keys, and so its partials as shares of grad_q."""
    p, widest = problem, max(problem.head_dim, problem.value_dim)
    of_shares = replace(p, value_dim=widest)
    # Beside many wide rows of q and grad_out, shared memory holds no more keys.
    most_keys = 32 if widest > 128 and p.heads_per_pair > 64 else 64
    plan = plan_forward(of_shares, room_bytes, path, tuning, buffers)
    tile = partial_tile(of_shares, tuning.partial, most_keys)
    return replace(plan, tile=replace(tile, tiles_per_item=plan.tile.tiles_per_item))


def _query_tuning(problem: Problem, tuning: Tuning, query_rows: int) -> Tuning:
    """Tiles that hold q, grad_out and grad_q; which blocks they share is the forward pass's to say.

    Products of float32 in three parts take the registers and the shared memory of three; 4 warps as in
    ``default_tuning``.
    """
    is_float32 = problem.dtype == torch.float32
    widest = max(padded_dim(problem.head_dim), padded_dim(problem.value_dim))
    rows = 32 if is_float32 else 64
    is_wide = widest > 128 or problem.heads_per_pair > rows
    sizes = {"rows": rows, "num_warps": 8 if is_wide and not is_float32 else 4}
    # Three programs share a multiprocessor instead of two.
    max_registers = MAX_REGISTERS if is_float32 or is_wide else 168
    partial = replace(tuning.partial, **sizes, max_registers=max_registers)
    num_stages = 1 if is_float32 or problem.heads_per_pair > rows else 2
    shared = replace(tuning.shared, **sizes, max_registers=MAX_REGISTERS, num_stages=num_stages)
    if not is_float32 and query_rows > rows:
        larger = replace(shared, rows=query_rows, num_warps=8)
        # What lies in one row of indices stays there.
        if row_tile_tokens(problem, larger) or not row_tile_tokens(problem, shared):
            shared = larger
    return Tuning(partial, shared)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What follows from the problem alone, or nearly.

    ``block_bytes`` are the float32 gradients of a block's k and v, ``partials`` a token's shares of grad_q.
    """

    problem: Problem
    delta_heads: int
    tile_heads_per_kv_head: int
    segments: int
    tile_rows: int
    tile_pairs: int
    tile_keys: int
    num_warps: int
    num_stages: int
    block_bytes: int
    partials: int
    most_tokens: int

    @classmethod
    def of(cls, problem: Problem, delta_heads: int) -> "_Sizes":
        p = problem
        widest = max(padded_dim(p.head_dim), padded_dim(p.value_dim))
        is_float32 = p.dtype == torch.float32
        # The gradients of these keys live in registers, beside products of float32 in three parts.
        tile_keys = min(p.block_size, 16 if is_float32 else 64 if widest <= 128 else 32)
        tile_rows = max(32 if is_float32 else KEY_ROWS, power_of_two(p.heads_per_pair))
        partials = p.num_slots * p.heads_per_pair * p.head_dim
        # The last number of a chunk, not their count, has to fit.
        most_tokens = (MAX_CHUNK_NUMBERS + 1) // (p.num_q_heads * max(p.head_dim, p.value_dim))
        is_small = widest <= 128 and tile_rows <= 64
        return cls(
            problem=p,
            delta_heads=delta_heads,
            tile_heads_per_kv_head=p.group_size // p.heads_per_pair,
            segments=num_segments(p),
            tile_rows=tile_rows,
            tile_pairs=tile_rows // p.heads_per_pair,
            tile_keys=tile_keys,
            # Measured at D = 128, 16 bits: 4 warps take two thirds of the time of 8, though their programs
            # begin and end with spills; wider heads spill in the loop.
            num_warps=4 if is_small else 8,
            # A tenth faster from 4 heads a pair on, a twentieth slower at one.
            num_stages=2 if is_small and not is_float32 and p.heads_per_pair >= 4 else 1,
            block_bytes=FLOAT32_BYTES * p.block_size * (p.head_dim + p.value_dim),
            partials=partials,
            most_tokens=min(most_tokens, 1 << (31 - _bits(p.num_slots))),
        )

    def pairs_per_item(self, pairs: int) -> int:
        """Whole tiles of about as many."""
        return self.tile_pairs * max(pairs // self.tile_pairs, 1)

    def max_splits(self, pairs: int, pairs_per_item: int) -> int:
        """Items of blocks that have several: full ones, and one that is not a block."""
        full_items = pairs // pairs_per_item
        return full_items + min(full_items, self.segments)

    def list_bytes(self, max_items: int) -> int:
        """Of a chunk's index what is no pair's.

        Where segments begin, in the pairs, the items and the splits; the segments of the items; counters.
        """
        return INT32_BYTES * (4 * (self.segments + 1) + max_items + TILE_PAIRS)

    def plan(self, *, chunk_tokens: int, **chosen: Any) -> KeyPlan:
        # As many for all that are no longer, so that kernels are compiled once.
        is_long = chunk_tokens > MAX_CHUNK_TOKENS
        return KeyPlan(
            chunk_tokens=chunk_tokens,
            slot_bits=_bits(self.problem.num_slots) if is_long else SLOT_BITS,
            tile_rows=self.tile_rows,
            tile_pairs=self.tile_pairs,
            tile_keys=self.tile_keys,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **chosen,
        )


def _bits(num_slots: int) -> int:
    return (num_slots - 1).bit_length()


def _pair_bytes(pairs: int) -> int:
    """Of pairs in the index: of each its rank, its token and slot; and counters of their strips."""
    return INT32_BYTES * (2 * pairs + -(-pairs // PAIRS_A_COUNTER))


def _in_one_chunk(sizes: _Sizes, room_bytes: int, item_pairs: int, *, with_queries: bool) -> KeyPlan | None:
    """All tokens at once, so that most blocks' gradients are written as they are made; None: too many."""
    p, ranks = sizes.problem, sizes.tile_heads_per_kv_head
    pairs = p.num_q_tokens * p.num_slots
    pairs_per_item = sizes.pairs_per_item(item_pairs)
    max_items = pairs // pairs_per_item + min(sizes.segments, pairs)
    max_splits = sizes.max_splits(pairs, pairs_per_item)
    partial_bytes = p.num_q_tokens * sizes.partials * p.dtype.itemsize
    has_parts = p.block_size > sizes.tile_keys or ranks > 1
    if with_queries and (has_parts or p.num_q_tokens * sizes.partials > MAX_CHUNK_NUMBERS):
        return None
    head_bytes = (max_splits + (ranks > 1) * sizes.segments) * sizes.block_bytes
    head_bytes = max(head_bytes + with_queries * partial_bytes, 1)
    index_bytes = sizes.list_bytes(max_items) + _pair_bytes(pairs)
    if index_bytes + head_bytes > room_bytes or p.num_q_tokens > sizes.most_tokens:
        return None
    kv_heads = sizes.delta_heads
    if p.index_heads > 1:
        # Sums are kept while the tile heads of a KV head are indexed one after another.
        most = room_bytes // (index_bytes + head_bytes)
        most = most if ranks > 1 else (room_bytes - head_bytes) // index_bytes
        most = min(most, MAX_CHUNK_NUMBERS // max(pairs, sizes.segments + 1))
        kv_heads = equal_parts(kv_heads, min(max(most, 1), kv_heads))
    index_heads = kv_heads if p.index_heads > 1 else 1
    launch_heads = kv_heads if ranks > 1 else (room_bytes - index_heads * index_bytes) // head_bytes
    if with_queries:
        launch_heads = min(launch_heads, MAX_CHUNK_NUMBERS // (p.num_q_tokens * sizes.partials))
    launch_heads = equal_parts(kv_heads, min(max(launch_heads, 1), kv_heads))
    return sizes.plan(
        with_queries=with_queries,
        has_sums=ranks > 1,
        kv_heads=kv_heads,
        launch_heads=launch_heads,
        chunk_tokens=p.num_q_tokens,
        group_tokens=p.num_q_tokens,
        range_segments=sizes.segments,
        pairs_per_item=pairs_per_item,
        max_items=max_items,
        max_splits=max_splits,
        workspace_bytes=index_heads * index_bytes + launch_heads * head_bytes,
    )


def _in_chunks(sizes: _Sizes, room_bytes: int) -> KeyPlan:
    """One KV head at a time: sums of a range of its blocks, splits of a chunk, the index of a group."""
    p = sizes.problem
    range_segments = min(max(room_bytes * 3 // 8 // sizes.block_bytes, 1), sizes.segments)
    pairs_per_item = sizes.pairs_per_item(LONG_ITEM_PAIRS)
    split_bytes = -(-2 * p.num_slots * sizes.block_bytes // pairs_per_item)
    index_tokens = room_bytes // 4 // _pair_bytes(p.num_slots)
    chunk_tokens = min(room_bytes * 5 // 16 // split_bytes, index_tokens, sizes.most_tokens)
    chunk_tokens = min(max(chunk_tokens, MIN_CHUNK_TOKENS), sizes.most_tokens, p.num_q_tokens)
    # Equal chunks: a short last one would leave its tiles empty.
    chunk_tokens = equal_parts(p.num_q_tokens, chunk_tokens)
    pairs = chunk_tokens * p.num_slots
    max_items = pairs // pairs_per_item + min(sizes.segments, pairs)
    max_splits = sizes.max_splits(pairs, pairs_per_item)
    index_bytes = _pair_bytes(pairs) + sizes.list_bytes(max_items)
    group_chunks = min(max(room_bytes // 4 // index_bytes, 1), -(-p.num_q_tokens // chunk_tokens))
    held_blocks = max_splits + range_segments
    return sizes.plan(
        with_queries=False,
        has_sums=True,
        kv_heads=1,
        launch_heads=1,
        chunk_tokens=chunk_tokens,
        group_tokens=min(group_chunks * chunk_tokens, p.num_q_tokens),
        range_segments=range_segments,
        pairs_per_item=pairs_per_item,
        max_items=max_items,
        max_splits=max_splits,
        workspace_bytes=held_blocks * sizes.block_bytes + group_chunks * index_bytes,
    )

"""How the gradients of one call are cut into passes, chunks and tiles, and the workspace they take."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from fsa_core.plan import (
    DEFAULT_WORKSPACE_BYTES,
    MAX_CHUNK_NUMBERS,
    MAX_CHUNK_TOKENS,
    MAX_WORKSPACE_BYTES,
    MIN_CHUNK_TOKENS,
    equal_parts,
    num_segments,
    padded_dim,
    power_of_two,
)
from fsa_core.problem import Problem

INT32_BYTES = 4
FLOAT32_BYTES = 4
# A pair in the index: itself and its key, both before and after the sort, its place in 64 bits, and what the
# sort reads from in between.
INDEX_PAIR_BYTES = 36
# Tiles of a work item: few where partial gradients of q bound a chunk anyway, many where a chunk can be long.
TILES_PER_ITEM = 16
LONG_TILES_PER_ITEM = 128


@dataclass(frozen=True, slots=True)
class Pass:
    """One walk over all pairs, in chunks of tokens; a group is a whole number of chunks, indexed together.

    ``with_keys``: it yields the gradients of k and v; ``with_queries``: those of q. A work item is up to
    ``pairs_per_item`` pairs of one KV block. The blocks of a chunk that have more than one item have at most
    ``max_splits`` together.
    """

    with_keys: bool
    with_queries: bool
    chunk_tokens: int
    group_tokens: int
    pairs_per_item: int
    max_items: int
    max_splits: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """Gradients of ``kv_heads`` KV heads at a time, those of keys for ``range_segments`` KV blocks at a time.

    One pass of five matrix products if a single chunk holds all shares of grad_q; else two of seven in all,
    so that no chunk reads and writes the gradients of all keys again. A program has ``tile_keys`` keys of a
    block and walks its pairs ``tile_pairs`` at a time, in ``tile_rows`` rows. Other names as in
    ``ForwardPlan``.
    """

    passes: tuple[Pass, ...]
    kv_heads: int
    range_segments: int
    heads_per_pair: int
    tile_heads_per_kv_head: int
    index_per_head: bool
    segments: int
    tile_rows: int
    tile_pairs: int
    tile_keys: int
    num_warps: int
    workspace_bytes: int


@lru_cache(maxsize=1024)
def plan_backward(problem: Problem, limit_bytes: int = DEFAULT_WORKSPACE_BYTES) -> BackwardPlan:
    """The largest chunks and ranges that ``limit_bytes`` of workspace allows, one KV head before the next.

    At least 16 tokens (or all) ride in a chunk and one KV block in a range, whatever the limit.
    """
    p = problem
    limit_bytes = min(limit_bytes, MAX_WORKSPACE_BYTES)
    sizes = _Sizes.of(p)
    room = max(limit_bytes - sizes.delta_bytes, limit_bytes // 2)
    range_segments = min(max(room * 3 // 8 // sizes.block_bytes, 1), sizes.segments)
    one_pass = _pass(sizes, room, with_keys=True, with_queries=True)
    passes: tuple[Pass, ...] = (one_pass,)
    # Measured on an H200: in one chunk, five products are a third faster; in 3, they take the same time; in
    # 4 and more, seven are.
    if range_segments < sizes.segments or one_pass.chunk_tokens < p.num_q_tokens:
        passes = (
            _pass(sizes, room, with_keys=True, with_queries=False),
            _pass(sizes, room, with_keys=False, with_queries=True),
        )
    head_bytes = sizes.delta_bytes + range_segments * sizes.block_bytes
    head_bytes += max(one.workspace_bytes for one in passes)
    is_whole = range_segments == sizes.segments and all(x.chunk_tokens == p.num_q_tokens for x in passes)
    most_heads = min(limit_bytes // head_bytes, MAX_CHUNK_NUMBERS // (p.num_q_tokens * sizes.partials))
    kv_heads = min(max(most_heads, 1), p.num_kv_heads) if is_whole else 1
    kv_heads = equal_parts(p.num_kv_heads, kv_heads)
    return BackwardPlan(
        passes=passes,
        kv_heads=kv_heads,
        range_segments=range_segments,
        heads_per_pair=p.heads_per_pair,
        tile_heads_per_kv_head=p.group_size // p.heads_per_pair,
        index_per_head=p.index_heads > 1,
        segments=sizes.segments,
        tile_rows=sizes.tile_rows,
        tile_pairs=sizes.tile_pairs,
        tile_keys=sizes.tile_keys,
        num_warps=sizes.num_warps,
        workspace_bytes=kv_heads * head_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What follows from the problem alone.

    ``block_bytes`` are the float32 gradients of a block's k and v, ``partials`` a token's shares of grad_q.
    """

    problem: Problem
    segments: int
    widest: int
    tile_rows: int
    tile_pairs: int
    tile_keys: int
    num_warps: int
    block_bytes: int
    partials: int
    delta_bytes: int

    @classmethod
    def of(cls, problem: Problem) -> "_Sizes":
        p = problem
        widest = max(padded_dim(p.head_dim), padded_dim(p.value_dim))
        # The gradients of these keys live in registers, beside products of float32 in three parts.
        tile_keys = min(p.block_size, 16 if p.dtype == torch.float32 else 64 if widest <= 128 else 32)
        tile_rows = max(32 if p.dtype == torch.float32 else 64, power_of_two(p.heads_per_pair))
        return cls(
            problem=p,
            segments=num_segments(p),
            widest=widest,
            tile_rows=tile_rows,
            tile_pairs=tile_rows // p.heads_per_pair,
            tile_keys=tile_keys,
            # Measured at D = 128: 4 warps take two thirds of the time of 8, though their programs begin and
            # end with spills; wider heads spill in the loop.
            num_warps=4 if widest <= (64 if p.dtype == torch.float32 else 128) else 8,
            block_bytes=FLOAT32_BYTES * p.block_size * (p.head_dim + p.value_dim),
            partials=p.num_slots * p.heads_per_pair * (p.block_size // tile_keys) * p.head_dim,
            delta_bytes=FLOAT32_BYTES * p.num_q_tokens * p.group_size,
        )


def _pass(sizes: _Sizes, room_bytes: int, *, with_keys: bool, with_queries: bool) -> Pass:
    p = sizes.problem
    pairs_per_item = sizes.tile_pairs * (TILES_PER_ITEM if with_queries else LONG_TILES_PER_ITEM)
    partial_bytes = sizes.partials * p.dtype.itemsize
    split_bytes = -(-2 * p.num_slots * sizes.block_bytes // pairs_per_item)
    token_bytes = with_queries * partial_bytes + with_keys * split_bytes
    index_tokens = room_bytes // 4 // (INDEX_PAIR_BYTES * p.num_slots)
    chunk_tokens = min(room_bytes * 5 // 16 // token_bytes, index_tokens, MAX_CHUNK_TOKENS)
    most_tokens = MAX_CHUNK_NUMBERS // max(sizes.partials, p.num_q_heads * max(p.head_dim, p.value_dim))
    chunk_tokens = min(max(chunk_tokens, MIN_CHUNK_TOKENS), most_tokens, p.num_q_tokens)
    # Equal chunks: a short last one would leave its tiles empty.
    chunk_tokens = equal_parts(p.num_q_tokens, chunk_tokens)
    pairs = chunk_tokens * p.num_slots
    full_items = pairs // pairs_per_item
    max_items = full_items + min(sizes.segments, pairs)
    index_bytes = INDEX_PAIR_BYTES * pairs + INT32_BYTES * (6 * (sizes.segments + 1) + max_items)
    group_chunks = min(max(room_bytes // 4 // index_bytes, 1), -(-p.num_q_tokens // chunk_tokens))
    return Pass(
        with_keys=with_keys,
        with_queries=with_queries,
        chunk_tokens=chunk_tokens,
        group_tokens=min(group_chunks * chunk_tokens, p.num_q_tokens),
        pairs_per_item=pairs_per_item,
        max_items=max_items,
        # A block of n > 1 items has more pairs than n - 1 of them.
        max_splits=2 * full_items,
        workspace_bytes=chunk_tokens * token_bytes + group_chunks * index_bytes,
    )

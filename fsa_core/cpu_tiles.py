"""How the CPU backend cuts a part into tiles, in the forward pass and in the backward pass.

The (token, slot) pairs of a part are sorted by the KV block they chose; the pairs of one block are a segment,
and a segment is cut into tiles, each a few matrix products. What shapes the tiles of a sequence never comes
from outside it: they are cut from the start of each segment, and a tile is computed by one thread with
products of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fsa_core.cpu_parts import Layout, Part, is_used
from fsa_core.packing import Placement
from fsa_core.problem import Problem

# A segment (all queries of one KV block) is cut greedily into tiles of these rows; only the last kind may
# have unused rows. Large tiles amortise the block's copy, small ones keep a decode step from being padding.
TILE_ROWS = (192, 48, 16)
# Tiles that are computed together: few enough for the cache, enough to make Python's share of the time small.
BATCH_BYTES = 8 * 2**20
# K/V blocks that are laid out for their tiles at once.
BLOCKS_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Pairs:
    """The used slots of a chunk in (unit, token, slot) order; ``block_start`` is the block's first key.

    All int64 [num_pairs]; ``count`` is int64 [num_units * num_tokens]: how many pairs each row has.
    """

    unit: torch.Tensor
    token: torch.Tensor
    block_start: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """The pairs of a chunk sorted by the block they chose; a segment is the pairs of one block.

    A pair [num_pairs, int64]: ``order``, its number in (unit, token, slot) order; ``q_row``, its row in the
    chunk's q; ``num_visible``, the keys it sees from the block's first on. A segment [num_segments, int64]:
    ``first`` and ``size``, its pairs; ``first_key`` and ``end_key``, packed, its block's first key and its
    sequence's end; ``kv_head``.
    """

    order: torch.Tensor
    q_row: torch.Tensor
    num_visible: torch.Tensor
    first: torch.Tensor
    size: torch.Tensor
    first_key: torch.Tensor
    end_key: torch.Tensor
    kv_head: torch.Tensor

    def __getitem__(self, part: slice) -> "Segments":
        of_segments = (self.first, self.size, self.first_key, self.end_key, self.kv_head)
        return Segments(self.order, self.q_row, self.num_visible, *(x[part] for x in of_segments))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one size. Each is of one segment, whose number is in ``segment`` [num_tiles].

    ``entry``: int64 [num_tiles, pairs_per_tile], sorted pairs; ``is_used``, which places hold a pair of the
    tile, the others any; None when all do.
    """

    segment: torch.Tensor
    entry: torch.Tensor
    is_used: torch.Tensor | None

    def __getitem__(self, part: slice) -> "Tiles":
        return Tiles(
            self.segment[part], self.entry[part], None if self.is_used is None else self.is_used[part]
        )


class Scratch:
    """Memory that one batch of tiles after the other works in, by name, float32.

    A first touch of fresh memory costs as much as the arithmetic on it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """``shape`` floats with any content, the same memory as the last time."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=torch.float32, device="cpu")
        return self._buffers[name][:size].view(shape)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a part works on; ``q`` is float32 [num_tokens * num_units, heads_per_unit * head_dim], scaled for
    the softmax."""

    problem: Problem
    layout: Layout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_k: torch.Tensor
    placed: Placement
    pairs: Pairs
    first_head: int

    @property
    def num_units(self) -> int:
        return self.pairs.count.numel() // self.placed.sequence.numel()


def chunk_of(
    problem: Problem,
    part: Part,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scratch: Scratch,
) -> Chunk:
    """The inputs of one part, out of those of the call; q goes into ``scratch``."""
    layout = Layout.of(problem)
    upk, kv_heads = layout.units_per_kv_head, part.kv_heads
    num_units = (kv_heads.stop - kv_heads.start) * upk
    if problem.index_heads < problem.num_kv_heads:
        ids = block_indices[:, part.tokens].expand(num_units, -1, -1)
    else:
        ids = block_indices[kv_heads.start * upk : kv_heads.stop * upk, part.tokens]
    used = is_used(problem, ids, part.placed.num_visible_keys)
    unit, token, slot = used.nonzero(as_tuple=True)
    pairs = Pairs(unit, token, ids[unit, token, slot].long() * problem.block_size, used.sum(-1).flatten())
    its_q = q[part.tokens, part.q_heads]
    q_rows = scratch.take("q of part", *its_q.shape).copy_(its_q).mul_(problem.softmax_scale)
    q_rows = q_rows.view(-1, layout.heads_per_unit * problem.head_dim)
    return Chunk(problem, layout, q_rows, k, v, cu_seqlens_k.long(), part.placed, pairs, kv_heads.start)


def segment_runs(chunk: Chunk) -> Iterator[tuple[Segments, bool]]:
    """Runs of segments whose K/V blocks fit ``BLOCKS_BYTES``; the flag says that they need a mask: that none
    of their pairs sees a key after the block."""
    segments, num_whole = _segments(chunk)
    p, num_segments = chunk.problem, segments.size.numel()
    at_once = max(BLOCKS_BYTES // (4 * p.block_size * (p.head_dim + p.value_dim)), 1)
    for start, end, masked in ((0, num_whole, False), (num_whole, num_segments, True)):
        for first in range(start, end, at_once):
            yield segments[first : min(first + at_once, end)], masked


def _segments(chunk: Chunk) -> tuple[Segments, int]:
    """Invert the selection; the number says how many segments come first that need no mask."""
    p, pairs, layout = chunk.problem, chunk.pairs, chunk.layout
    num_blocks = -(-chunk.cu_seqlens_k.diff() // p.block_size)
    first_block = num_blocks.cumsum(0) - num_blocks
    total_blocks = int(num_blocks.sum())
    sequence = chunk.placed.sequence.index_select(0, pairs.token)
    block = first_block.index_select(0, sequence) + pairs.block_start // p.block_size
    key = (pairs.unit // layout.units_per_kv_head) * total_blocks + block
    num_visible = chunk.placed.num_visible_keys.index_select(0, pairs.token) - pairs.block_start
    first_cut_key = p.num_kv_heads * total_blocks
    # The token at a block's end sees all of it, and yet fills up the tile of those before it.
    keys, order = (key + (num_visible <= p.block_size) * first_cut_key).sort(stable=True)
    segment_key, size = torch.unique_consecutive(keys, return_counts=True)
    first = size.cumsum(0) - size
    leader = order[first]
    sequence = sequence[leader]
    segments = Segments(
        order=order,
        q_row=(pairs.token * chunk.num_units + pairs.unit).index_select(0, order),
        num_visible=num_visible.index_select(0, order),
        first=first,
        size=size,
        first_key=chunk.cu_seqlens_k[sequence] + pairs.block_start[leader],
        end_key=chunk.cu_seqlens_k[sequence + 1],
        kv_head=chunk.first_head + pairs.unit[leader] // layout.units_per_kv_head,
    )
    return segments, int((segment_key < first_cut_key).sum())


def key_and_value_blocks(chunk: Chunk, segments: Segments, masked: bool, scratch: Scratch) -> torch.Tensor:
    """K beside V of each segment's block, float32 [num_segments, block_size * (head_dim + value_dim)].

    It lies in ``scratch``, until the next call.
    """
    p = chunk.problem
    key = segments.first_key[:, None] + torch.arange(p.block_size, device=segments.first_key.device)
    row = (key.clamp(max=p.num_k_tokens - 1) * p.num_kv_heads + segments.kv_head[:, None]).flatten()
    blocks = scratch.take("keys and values", row.numel(), p.head_dim + p.value_dim)
    for x, side in zip((chunk.k, chunk.v), blocks.split((p.head_dim, p.value_dim), dim=1), strict=True):
        side.copy_(x.view(-1, x.shape[-1]).index_select(0, row))
    if masked:
        # What lies past a sequence's end is another's: even times zero its NaN would be a NaN.
        blocks.masked_fill_((key >= segments.end_key[:, None]).view(-1, 1), 0)
    return blocks.view(len(key), -1)


def tile_batches(chunk: Chunk, segments: Segments) -> Iterator[Tiles]:
    """Cut segments into tiles, and tiles of one size into batches."""
    first, remaining, device = segments.first, segments.size, segments.size.device
    for rows in TILE_ROWS:
        may_be_short = rows == TILE_ROWS[-1]
        per_tile = max(rows // chunk.layout.heads_per_unit, 1)
        num_tiles = (remaining + (per_tile - 1 if may_be_short else 0)) // per_tile
        segment = torch.arange(remaining.numel(), device=device).repeat_interleave(num_tiles)
        rank = torch.arange(segment.numel(), device=device) - (num_tiles.cumsum(0) - num_tiles)[segment]
        start, place = first[segment] + rank * per_tile, torch.arange(per_tile, device=device)
        is_used = None
        if may_be_short:
            is_used = place < (remaining[segment] - rank * per_tile)[:, None]
            place = place.where(is_used, 0)
        tiles = Tiles(segment, start[:, None] + place, is_used)
        taken = num_tiles * per_tile
        first, remaining = first + taken, (remaining - taken).clamp(min=0)
        size = _tiles_at_once(chunk, per_tile)
        for start_of_batch in range(0, segment.numel(), size):
            yield _at_least_two(tiles[start_of_batch : start_of_batch + size])


def places(segments: Segments, entries: list[torch.Tensor]) -> torch.Tensor:
    """Where each pair lies, int64 [num_pairs], when the sorted pairs ``entries`` lie one after the other."""
    place = torch.empty_like(segments.order)
    place[segments.order[torch.cat(entries)]] = torch.arange(place.numel(), device=place.device)
    return place


def _tiles_at_once(chunk: Chunk, pairs_per_tile: int) -> int:
    p, rows = chunk.problem, pairs_per_tile * chunk.layout.heads_per_unit
    tile_bytes = 4 * ((rows + p.block_size) * (p.head_dim + p.value_dim) + rows * p.block_size)
    return max(BATCH_BYTES // tile_bytes, 2)


def _at_least_two(tiles: Tiles) -> Tiles:
    """Add an empty tile to a lone one: torch would spread a single tile's products over all threads, and
    round otherwise than in a larger batch, where each tile is one thread's."""
    if tiles.segment.numel() > 1:
        return tiles
    is_used = torch.ones_like(tiles.entry, dtype=torch.bool) if tiles.is_used is None else tiles.is_used
    empty = torch.zeros_like(is_used)
    return Tiles(tiles.segment.repeat(2), tiles.entry.repeat(2, 1), torch.cat((is_used, empty)))

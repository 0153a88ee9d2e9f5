"""Selected attention on the CPU: the KV-major algorithm of the GPU kernels, in torch operations.

The queries that selected a KV block are gathered into tiles, a tile attends to its one block, and the
partial answers of a token are merged by their log-sum-exp. Arithmetic is float32 throughout.

A sequence's answer is bitwise the same alone and in any company, because nothing that shapes it comes from
outside: chunks and tiles are cut from the start of each sequence and count only slots that are in use, a tile
is computed by one thread with a matrix product of its own, and slots are added one after the other.

A NaN in k or v may reach every query that selected its block, as in any tiled attention; it reaches no other.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fsa_core.packing import Placement, place_queries
from fsa_core.problem import Problem

# The answer costs first touches of fresh memory as much as arithmetic, so the workspace is small and reused.
CPU_WORKSPACE_BYTES = 64 * 2**20
# A segment (all queries of one KV block) is cut greedily into tiles of these rows; only the last kind may
# have unused rows. Large tiles amortise the block's copy, small ones keep a decode step from being padding.
TILE_ROWS = (1024, 256, 64, 16)
# Tiles that are computed together: few enough for the cache, enough to make waking all threads worthwhile
# where other processes want the cores as well.
BATCH_BYTES = 8 * 2**20
# K/V blocks that are laid out for their tiles at once.
BLOCKS_BYTES = 16 * 2**20
INDEX_ROWS_AT_ONCE = 65536


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a (token, slot) pair means in this call.

    A unit owns a list of selected blocks: a KV head, or a query head when each selects for itself.
    ``heads_per_unit`` query heads ride with every pair.
    """

    units_per_kv_head: int
    heads_per_unit: int

    @classmethod
    def of(cls, problem: Problem) -> "_Layout":
        units = max(problem.index_heads, problem.num_kv_heads)
        return cls(
            units_per_kv_head=units // problem.num_kv_heads, heads_per_unit=problem.num_q_heads // units
        )

    def pair_bytes(self, problem: Problem) -> int:
        return 128 + self.heads_per_unit * (4 * problem.value_dim + 56)


@dataclass(frozen=True, slots=True)
class _Part:
    """Query tokens under KV heads that share one pass through the workspace."""

    tokens: slice
    heads: slice
    num_pairs: int


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The used slots of a chunk in (unit, token, slot) order; ``block_start`` is the block's first key.

    All int64 [num_pairs]; ``count`` is int64 [num_units * num_tokens]: how many pairs each row has.
    """

    unit: torch.Tensor
    token: torch.Tensor
    block_start: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Segments:
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

    def __getitem__(self, part: slice) -> "_Segments":
        of_segments = (self.first, self.size, self.first_key, self.end_key, self.kv_head)
        return _Segments(self.order, self.q_row, self.num_visible, *(x[part] for x in of_segments))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one size: each is ``count`` sorted pairs from ``first`` on, of segment number ``segment``."""

    segment: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    pairs_per_tile: int

    def __getitem__(self, part: slice) -> "_Tiles":
        return _Tiles(self.segment[part], self.first[part], self.count[part], self.pairs_per_tile)


@dataclass(frozen=True, slots=True)
class _Partials:
    """What each pair's queries got from its block alone, float32, in tile order.

    ``out`` [num_pairs, heads_per_unit, value_dim] and ``row_sum`` [num_pairs, heads_per_unit] are sums over
    the block's keys of exp(score - row_max), with and without the values.
    """

    out: torch.Tensor
    row_max: torch.Tensor
    row_sum: torch.Tensor

    @classmethod
    def empty(cls, num_pairs: int, heads_per_unit: int, value_dim: int) -> "_Partials":
        rows = (num_pairs, heads_per_unit)
        return cls(torch.empty(*rows, value_dim), torch.empty(rows), torch.empty(rows))

    def __getitem__(self, part: slice) -> "_Partials":
        return _Partials(self.out[part], self.row_max[part], self.row_sum[part])

    def take(self, source: "_Partials", pair: torch.Tensor) -> None:
        torch.index_select(source.out, 0, pair, out=self.out)
        torch.index_select(source.row_max, 0, pair, out=self.row_max)
        torch.index_select(source.row_sum, 0, pair, out=self.row_sum)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What a part works on; ``q``, scaled, is float32 [num_tokens * num_units, heads_per_unit * head_dim]."""

    problem: Problem
    layout: _Layout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_k: torch.Tensor
    placed: Placement
    pairs: _Pairs
    first_head: int

    @property
    def num_units(self) -> int:
        return self.pairs.count.numel() // self.placed.sequence.numel()


def selected_attention_cpu(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    workspace_limit_bytes: int = CPU_WORKSPACE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention over packed sequences; every tensor contiguous and on the CPU.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim], block_indices: int32 [index_heads, num_q_tokens, num_slots].
    Returns out [num_q_tokens, num_q_heads, value_dim] in q's dtype, lse float32 [num_q_tokens, num_q_heads].
    The workspace stays near ``workspace_limit_bytes`` (one token under one head may need more), beside a few
    bytes a token and one an index. Ids that a token may not see are ignored.
    """
    p, layout = problem, _Layout.of(problem)
    out = q.new_zeros(p.num_q_tokens, p.num_q_heads, p.value_dim)
    lse = torch.full((p.num_q_tokens, p.num_q_heads), -torch.inf)
    if not p.num_q_tokens:
        return out, lse
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, p.num_q_tokens, causal=p.causal)
    num_pairs = _pairs_per_token(p, block_indices, placed)
    parts = list(_parts(p, layout, num_pairs, placed.sequence, workspace_limit_bytes))
    most_pairs = max((part.num_pairs for part in parts), default=0)
    workspace = _Partials.empty(most_pairs, layout.heads_per_unit, p.value_dim)
    for part in parts:
        if part.num_pairs:
            q_heads = slice(part.heads.start * p.group_size, part.heads.stop * p.group_size)
            chunk = _chunk(
                p, layout, part, q[part.tokens, q_heads], k, v, block_indices, cu_seqlens_k, placed
            )
            partials = workspace[: part.num_pairs]
            place = _attend_chunk(chunk, partials)
            out[part.tokens, q_heads], lse[part.tokens, q_heads] = _merge(chunk, partials, place)
    return out, lse


def _is_used(problem: Problem, block_indices: torch.Tensor, num_visible_keys: torch.Tensor) -> torch.Tensor:
    num_visible_blocks = -(-num_visible_keys // problem.block_size)
    return (block_indices >= 0) & (block_indices < num_visible_blocks[:, None])


def _pairs_per_token(problem: Problem, block_indices: torch.Tensor, placed: Placement) -> torch.Tensor:
    """int64 [num_kv_heads, num_q_tokens]: the used slots of each token under each KV head."""
    rows = zip(
        block_indices.split(INDEX_ROWS_AT_ONCE, dim=1),
        placed.num_visible_keys.split(INDEX_ROWS_AT_ONCE),
        strict=True,
    )
    counts = torch.cat([_is_used(problem, ids, visible).sum(-1) for ids, visible in rows], dim=1)
    if problem.index_heads < problem.num_kv_heads:
        return counts.expand(problem.num_kv_heads, -1)
    per_kv_head = problem.index_heads // problem.num_kv_heads
    return counts.view(problem.num_kv_heads, per_kv_head, problem.num_q_tokens).sum(1)


def _parts(
    problem: Problem, layout: _Layout, num_pairs: torch.Tensor, sequence: torch.Tensor, limit_bytes: int
) -> Iterator[_Part]:
    """Cut the call into parts whose workspace fits the limit, all tokens of a head before the next.

    Sequences are cut into pieces by their own slots alone, and two pieces of one never share a part, so that
    tiles do not depend on what else is in the batch.
    """
    heads = problem.num_kv_heads
    token_bytes = 4 * problem.group_size * (problem.head_dim + 3 * problem.value_dim)
    cost = num_pairs.amax(0) * layout.pair_bytes(problem) + token_bytes
    runs = list(_runs(cost, sequence, limit_bytes, limit_bytes // heads))
    for tokens, run_bytes in runs:
        at_once = min(max(limit_bytes // run_bytes, 1), heads)
        for first in range(0, heads, at_once):
            part_heads = slice(first, min(first + at_once, heads))
            yield _Part(tokens, part_heads, int(num_pairs[part_heads, tokens].sum()))


def _runs(
    cost: torch.Tensor, sequence: torch.Tensor, piece_bytes: int, run_bytes: int
) -> Iterator[tuple[slice, int]]:
    """Runs of tokens, and what each costs: pieces of at most ``piece_bytes``, and several of different
    sequences together up to ``run_bytes``."""
    before = cost.cumsum(0) - cost
    starts_sequence = F.pad(sequence.diff() != 0, (1, 0), value=True)
    sequence_length = torch.unique_consecutive(sequence, return_counts=True)[1]
    piece = (before - before[starts_sequence].repeat_interleave(sequence_length)) // piece_bytes
    starts = (starts_sequence | F.pad(piece.diff() != 0, (1, 0))).nonzero()[:, 0]
    pieces = zip(starts.tolist(), before[starts].tolist(), sequence[starts].tolist(), strict=True)
    end = (cost.numel(), int(cost.sum()), -1)
    first, first_before, _ = (0, 0, 0)
    previous_sequence = -1
    for (token, token_before, its_sequence), (_, next_before, _) in itertools.pairwise([*pieces, end]):
        if token > first and (next_before - first_before > run_bytes or its_sequence == previous_sequence):
            yield slice(first, token), token_before - first_before
            first, first_before = token, token_before
        previous_sequence = its_sequence
    if end[0] > first:
        yield slice(first, end[0]), end[1] - first_before


def _chunk(
    problem: Problem,
    layout: _Layout,
    part: _Part,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    placed: Placement,
) -> _Chunk:
    """The inputs of one part; ``q`` is the part's own: its tokens under its query heads."""
    tokens, upk = part.tokens, layout.units_per_kv_head
    here = Placement(placed.sequence[tokens], placed.position[tokens], placed.num_visible_keys[tokens])
    num_units = (part.heads.stop - part.heads.start) * upk
    if problem.index_heads < problem.num_kv_heads:
        ids = block_indices[:, tokens].expand(num_units, -1, -1)
    else:
        ids = block_indices[part.heads.start * upk : part.heads.stop * upk, tokens]
    used = _is_used(problem, ids, here.num_visible_keys)
    unit, token, slot = used.nonzero(as_tuple=True)
    pairs = _Pairs(unit, token, ids[unit, token, slot].long() * problem.block_size, used.sum(-1).flatten())
    q_rows = (q.float() * problem.softmax_scale).reshape(-1, layout.heads_per_unit * problem.head_dim)
    return _Chunk(problem, layout, q_rows, k, v, cu_seqlens_k.long(), here, pairs, part.heads.start)


def _attend_chunk(chunk: _Chunk, partials: _Partials) -> torch.Tensor:
    """Fill ``partials`` with every pair's own; returns where each pair lies in them, int64 [num_pairs]."""
    place = torch.empty(chunk.pairs.token.numel(), dtype=torch.int64)
    done = 0
    for segments, masked in _segment_runs(chunk):
        blocks = _blocks(chunk, segments, masked)
        for tiles in _tile_batches(chunk, segments):
            entry = tiles.first[:, None] + torch.arange(tiles.pairs_per_tile)
            used = (entry < (tiles.first + tiles.count)[:, None]).flatten().nonzero()[:, 0]
            entry.clamp_(max=place.numel() - 1)
            here = partials[done : done + used.numel()]
            is_full = used.numel() == entry.numel()
            results = here if is_full else _Partials.empty(entry.numel(), *partials.out.shape[1:])
            _attend_tiles(chunk, segments, entry, blocks.index_select(0, tiles.segment), masked, results)
            if not is_full:
                here.take(results, used)
            place[segments.order[entry.flatten()[used]]] = torch.arange(done, done + used.numel())
            done += used.numel()
    return place


def _segment_runs(chunk: _Chunk) -> Iterator[tuple[_Segments, bool]]:
    """Runs of segments whose K/V blocks fit ``BLOCKS_BYTES``; the flag says that they need a mask: that some
    of their pairs do not see the whole block."""
    segments, num_whole = _segments(chunk)
    p, num_segments = chunk.problem, segments.size.numel()
    at_once = max(BLOCKS_BYTES // (4 * p.block_size * (p.head_dim + p.value_dim)), 1)
    for start, end, masked in ((0, num_whole, False), (num_whole, num_segments, True)):
        for first in range(start, end, at_once):
            yield segments[first : min(first + at_once, end)], masked


def _segments(chunk: _Chunk) -> tuple[_Segments, int]:
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
    keys, order = (key + (num_visible < p.block_size) * first_cut_key).sort(stable=True)
    segment_key, size = torch.unique_consecutive(keys, return_counts=True)
    first = size.cumsum(0) - size
    leader = order[first]
    sequence = sequence[leader]
    segments = _Segments(
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


def _blocks(chunk: _Chunk, segments: _Segments, masked: bool) -> torch.Tensor:
    """K beside V of each segment's block, float32 [num_segments, block_size * (head_dim + value_dim)]."""
    p = chunk.problem
    key = segments.first_key[:, None] + torch.arange(p.block_size)
    row = (key.clamp(max=p.num_k_tokens - 1) * p.num_kv_heads + segments.kv_head[:, None]).flatten()
    sides = (_rows_float32(x.view(-1, x.shape[-1]), row) for x in (chunk.k, chunk.v))
    blocks = np.concatenate(tuple(sides), axis=1)
    if masked:
        # What lies past a sequence's end is another's: even times zero its NaN would be a NaN.
        blocks[(key >= segments.end_key[:, None]).flatten().numpy()] = 0
    return torch.from_numpy(blocks).view(len(key), -1)


def _tile_batches(chunk: _Chunk, segments: _Segments) -> Iterator[_Tiles]:
    """Cut segments into tiles, and tiles of one size into batches."""
    first, remaining = segments.first, segments.size
    for rows in TILE_ROWS:
        per_tile = max(rows // chunk.layout.heads_per_unit, 1)
        num_tiles = (remaining + (per_tile - 1 if rows == TILE_ROWS[-1] else 0)) // per_tile
        segment = torch.arange(remaining.numel()).repeat_interleave(num_tiles)
        rank = torch.arange(segment.numel()) - (num_tiles.cumsum(0) - num_tiles)[segment]
        count = (remaining[segment] - rank * per_tile).clamp(max=per_tile)
        tiles = _Tiles(segment, first[segment] + rank * per_tile, count, per_tile)
        taken = num_tiles * per_tile
        first, remaining = first + taken, (remaining - taken).clamp(min=0)
        size = _tiles_at_once(chunk, per_tile)
        for start in range(0, segment.numel(), size):
            yield _at_least_two(tiles[start : start + size])


def _tiles_at_once(chunk: _Chunk, pairs_per_tile: int) -> int:
    p, rows = chunk.problem, pairs_per_tile * chunk.layout.heads_per_unit
    tile_bytes = 4 * ((rows + p.block_size) * (p.head_dim + p.value_dim) + rows * p.block_size)
    return max(BATCH_BYTES // tile_bytes, 2)


def _at_least_two(tiles: _Tiles) -> _Tiles:
    """Add an empty tile to a lone one: torch would spread a single tile's products over all threads, and
    round otherwise than in a larger batch, where each tile is one thread's."""
    if tiles.segment.numel() > 1:
        return tiles
    twice = (tiles.segment.repeat(2), tiles.first.repeat(2), F.pad(tiles.count, (0, 1)))
    return _Tiles(*twice, tiles.pairs_per_tile)


def _attend_tiles(
    chunk: _Chunk,
    segments: _Segments,
    entry: torch.Tensor,
    blocks: torch.Tensor,
    masked: bool,
    results: _Partials,
) -> None:
    """Each tile's queries over its block, into ``results``.

    entry: int64 [num_tiles, pairs_per_tile], sorted pairs; unused places hold any pair, and what they give is
    dropped. blocks: float32 [num_tiles, block_size * (head_dim + value_dim)].
    """
    p, rows = chunk.problem, (len(entry), -1)
    k, v = blocks.view(len(entry), p.block_size, -1).split((p.head_dim, p.value_dim), dim=-1)
    q_row = segments.q_row.index_select(0, entry.flatten())
    q = chunk.q.index_select(0, q_row).view(*rows, p.head_dim)
    scores = torch.bmm(q, k.transpose(1, 2))
    if masked:
        num_visible = segments.num_visible[entry].repeat_interleave(chunk.layout.heads_per_unit, dim=1)
        scores.masked_fill_(torch.arange(p.block_size) >= num_visible[..., None], -torch.inf)
    row_max = torch.amax(scores, -1, out=results.row_max.view(rows))
    torch.sum(scores.sub_(row_max[..., None]).exp_(), -1, out=results.row_sum.view(rows))
    torch.bmm(scores, v, out=results.out.view(*rows, p.value_dim))


def _rows_float32(x: torch.Tensor, row: torch.Tensor) -> NDArray[np.float32]:
    """``x[row]`` in float32, by numpy: too little work to wake torch's threads for."""
    if x.dtype != torch.bfloat16:
        rows: NDArray[np.float32] = x.numpy()[row.numpy()].astype(np.float32, copy=False)
        return rows
    # The upper half of a float32.
    bits: NDArray[np.uint32] = x.view(torch.int16).numpy()[row.numpy()].astype(np.uint32)
    return (bits << 16).view(np.float32)


def _merge(chunk: _Chunk, partials: _Partials, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh each token's partial answers by their share of its softmax, and add them in slot order.

    place: where each pair lies in ``partials``. An embedding bag is exactly this: a weighted sum of rows,
    added one after the other.
    """
    p, heads, count = chunk.problem, chunk.layout.heads_per_unit, chunk.pairs.count
    first = count.cumsum(0) - count
    row = torch.arange(count.numel()).repeat_interleave(count)
    partial_max = partials.row_max.index_select(0, place)
    row_max = torch.full((count.numel(), heads), -torch.inf)
    row_max.scatter_reduce_(0, row[:, None].expand_as(partial_max), partial_max, "amax")
    weight = partial_max.sub_(row_max.index_select(0, row)).exp_()
    partial_sum = partials.row_sum.index_select(0, place).mul_(weight)
    row_sum = F.embedding_bag(torch.arange(len(row)), partial_sum, first, mode="sum")
    weight /= row_sum.index_select(0, row)
    # The bag of (row, head) holds that head of each of the row's pairs.
    head = torch.arange(heads)
    row_first = first.index_select(0, row)
    rank = torch.arange(len(row)) - row_first
    bag_entry = (row_first * heads + rank)[:, None] + head * count.index_select(0, row)[:, None]
    source = torch.empty(bag_entry.numel(), dtype=torch.int64)
    source[bag_entry.flatten()] = (place[:, None] * heads + head).flatten()
    bag_weight = torch.empty(bag_entry.numel())
    bag_weight[bag_entry.flatten()] = weight.flatten()
    bag_first = (first * heads)[:, None] + head * count[:, None]
    partial_out = partials.out.view(-1, p.value_dim)
    out = F.embedding_bag(source, partial_out, bag_first.flatten(), mode="sum", per_sample_weights=bag_weight)
    lse = (row_max + row_sum.log()).view(chunk.num_units, -1, heads)
    return (
        out.view(chunk.num_units, -1, heads, p.value_dim).transpose(0, 1).flatten(1, 2),
        lse.transpose(0, 1).flatten(1, 2),
    )

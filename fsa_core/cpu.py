"""Selected attention on the CPU: the KV-major algorithm of the GPU kernels, in torch operations.

The queries that selected a KV block are gathered into tiles, a tile attends to its one block, and the
partial answers of a token are merged by their log-sum-exp. Arithmetic is float32 throughout.

A sequence's answer is bitwise the same alone and in any company, because nothing that shapes it comes from
outside: chunks and tiles are cut from the start of each sequence and count only slots that are in use, a tile
is computed by one thread with matrix products of its own, and slots are added one after the other.

A NaN in k or v may reach every query that selected its block, as in any tiled attention; it reaches no other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fsa_core.cpu_parts import CPU_WORKSPACE_BYTES, Layout, Part, parts
from fsa_core.cpu_threads import share
from fsa_core.cpu_tiles import (
    Chunk,
    Scratch,
    Segments,
    Tiles,
    chunk_of,
    key_and_value_blocks,
    places,
    segment_runs,
    tile_batches,
)
from fsa_core.problem import Problem


@dataclass(frozen=True, slots=True)
class _Partials:
    """What each pair's queries got from its block alone, float32, in tile order.

    With ``peak`` the largest score, ``weight`` is the sum of exp(score - peak), and ``out`` the values summed
    with those weights: out [num_pairs, heads_per_unit, value_dim], the others [num_pairs, heads_per_unit].
    """

    out: torch.Tensor
    peak: torch.Tensor
    weight: torch.Tensor


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
    The workspace of each of torch's threads stays near ``workspace_limit_bytes`` (one token under one head
    may need more), beside a few bytes a token and one an index. Ids that a token may not see are ignored.
    """
    p, heads_per_unit = problem, Layout.of(problem).heads_per_unit
    out = q.new_zeros(p.num_q_tokens, p.num_q_heads, p.value_dim)
    lse = q.new_full((p.num_q_tokens, p.num_q_heads), -torch.inf, dtype=torch.float32)
    cut = parts(
        p,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        pair_bytes=4 * heads_per_unit * (p.value_dim + 14),
        token_bytes=4 * p.group_size * (p.head_dim + 3 * p.value_dim),
        limit_bytes=workspace_limit_bytes,
    )

    def attend(some: Iterator[Part]) -> None:
        scratch = Scratch()
        for part in some:
            chunk = chunk_of(p, part, q, k, v, block_indices, cu_seqlens_k, scratch)
            partial_out = scratch.take("partial out", part.num_pairs, heads_per_unit, p.value_dim)
            partials, place = _attend_chunk(chunk, partial_out, scratch)
            out[part.tokens, part.q_heads], lse[part.tokens, part.q_heads] = _merge(chunk, partials, place)

    # The largest first: threads end together, and scratch memory has its size from the start.
    share(sorted(cut, key=lambda part: part.num_pairs, reverse=True), attend)
    return out, lse


def _attend_chunk(chunk: Chunk, out: torch.Tensor, scratch: Scratch) -> tuple[_Partials, torch.Tensor]:
    """Every pair's own partials, with ``out`` for theirs; and where each pair lies, int64 [num_pairs]."""
    heads, value_dim = out.shape[1:]
    entries: list[torch.Tensor] = []
    peaks: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    done = 0
    for segments, masked in segment_runs(chunk):
        blocks = key_and_value_blocks(chunk, segments, masked, scratch)
        for tiles in tile_batches(chunk, segments):
            entry = tiles.entry.flatten()
            used = None if tiles.is_used is None else tiles.is_used.flatten().nonzero()[:, 0]
            num_used = entry.numel() if used is None else used.numel()
            here = out[done : done + num_used]
            of_tiles = here if used is None else scratch.take("out", entry.numel(), heads, value_dim)
            peak, weight = _attend_tiles(chunk, segments, tiles, blocks, masked, of_tiles, scratch)
            if used is not None:
                torch.index_select(of_tiles, 0, used, out=here)
                entry, peak, weight = (x.index_select(0, used) for x in (entry, peak, weight))
            entries.append(entry)
            peaks.append(peak)
            weights.append(weight)
            done += num_used
    return _Partials(out, torch.cat(peaks), torch.cat(weights)), places(segments, entries)


def _attend_tiles(
    chunk: Chunk,
    segments: Segments,
    tiles: Tiles,
    blocks: torch.Tensor,
    masked: bool,
    out: torch.Tensor,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's queries over its block, without the division by their weight.

    That goes into ``out`` [num_tiles * pairs_per_tile, heads_per_unit, value_dim]. Returns peak and weight
    [num_tiles * pairs_per_tile, heads_per_unit]. What unused places get is to be dropped. blocks: float32
    [num_segments, block_size * (head_dim + value_dim)].
    """
    p, heads, entry = chunk.problem, chunk.layout.heads_per_unit, tiles.entry
    size, rows = len(entry), entry.shape[1] * heads
    of_tile = scratch.take("blocks", size, blocks.shape[1])
    torch.index_select(blocks, 0, tiles.segment, out=of_tile)
    k, v = of_tile.view(size, p.block_size, -1).split((p.head_dim, p.value_dim), dim=-1)
    q = scratch.take("q", entry.numel(), chunk.q.shape[1])
    torch.index_select(chunk.q, 0, segments.q_row.index_select(0, entry.flatten()), out=q)
    scores = scratch.take("scores", size, rows, p.block_size)
    torch.bmm(q.view(size, rows, p.head_dim), k.transpose(1, 2), out=scores)
    if masked:
        num_visible = segments.num_visible[entry].repeat_interleave(heads, dim=1)
        key = torch.arange(p.block_size, device=scores.device)
        scores.masked_fill_(key >= num_visible[..., None], -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    weight = scores.sub_(peak).exp_().sum(-1)
    torch.bmm(scores, v, out=out.view(size, rows, p.value_dim))
    return peak.view(-1, heads), weight.view(-1, heads)


def _merge(chunk: Chunk, partials: _Partials, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring each token's partials to its largest score, and add them in slot order.

    place: where each pair lies in ``partials``. An embedding bag is exactly this: a weighted sum of rows,
    added one after the other.
    """
    p, heads, count = chunk.problem, chunk.layout.heads_per_unit, chunk.pairs.count
    num_rows, num_pairs, device = count.numel(), place.numel(), count.device
    first = count.cumsum(0) - count
    row = torch.arange(num_rows, device=device).repeat_interleave(count)
    factor = partials.peak.index_select(0, place)
    row_peak = torch.full((num_rows, heads), -torch.inf, dtype=torch.float32, device=device)
    row_peak.scatter_reduce_(0, row[:, None].expand_as(factor), factor, "amax")
    factor.sub_(row_peak.index_select(0, row)).exp_()
    weight = partials.weight.index_select(0, place).mul_(factor)
    row_weight = F.embedding_bag(torch.arange(num_pairs, device=device), weight, first, mode="sum")
    # A bag is a row under a head, all rows of a head before the next.
    head = torch.arange(heads, device=device)[:, None]
    out = F.embedding_bag(
        (place * heads + head).flatten(),
        partials.out.view(-1, p.value_dim),
        (first + head * num_pairs).flatten(),
        mode="sum",
        per_sample_weights=factor.t().flatten(),
    )
    out = out.view(heads, num_rows, p.value_dim)
    # A row without a pair has nothing to divide.
    out /= row_weight.where(row_weight != 0, 1).t()[..., None]
    lse = (row_peak + row_weight.log()).view(chunk.num_units, -1, heads)
    return (
        out.view(heads, chunk.num_units, -1, p.value_dim).permute(2, 1, 0, 3).flatten(1, 2),
        lse.transpose(0, 1).flatten(1, 2),
    )

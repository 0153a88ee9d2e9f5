"""Selected attention on the CPU: the KV-major algorithm of the GPU kernels, in torch operations.

The queries that selected a KV block are gathered into tiles, a tile attends to its one block, and the
partial answers of a token are merged by their log-sum-exp. Arithmetic is float32 throughout.

A sequence's answer is bitwise the same alone and in any company, because nothing that shapes it comes from
outside: chunks and tiles are cut from the start of each sequence and count only slots that are in use, a tile
is computed by one thread with a matrix product of its own, and slots are added one after the other.

A NaN in k or v may reach every query that selected its block, as in any tiled attention; it reaches no other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fsa_core.cpu_parts import CPU_WORKSPACE_BYTES, Layout, parts
from fsa_core.cpu_tiles import (
    Chunk,
    Segments,
    chunk_of,
    key_and_value_blocks,
    segment_runs,
    tile_batches,
)
from fsa_core.problem import Problem


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
    p, heads_per_unit = problem, Layout.of(problem).heads_per_unit
    out = q.new_zeros(p.num_q_tokens, p.num_q_heads, p.value_dim)
    lse = torch.full((p.num_q_tokens, p.num_q_heads), -torch.inf)
    cut = parts(
        p,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        pair_bytes=4 * heads_per_unit * (p.value_dim + 14),
        token_bytes=4 * p.group_size * (p.head_dim + 3 * p.value_dim),
        limit_bytes=workspace_limit_bytes,
    )
    most_pairs = max((part.num_pairs for part in cut), default=0)
    workspace = _Partials.empty(most_pairs, heads_per_unit, p.value_dim)
    for part in cut:
        chunk = chunk_of(p, part, q, k, v, block_indices, cu_seqlens_k)
        partials = workspace[: part.num_pairs]
        place = _attend_chunk(chunk, partials)
        out[part.tokens, part.q_heads], lse[part.tokens, part.q_heads] = _merge(chunk, partials, place)
    return out, lse


def _attend_chunk(chunk: Chunk, partials: _Partials) -> torch.Tensor:
    """Fill ``partials`` with every pair's own; returns where each pair lies in them, int64 [num_pairs]."""
    place = torch.empty(chunk.pairs.token.numel(), dtype=torch.int64)
    done = 0
    for segments, masked in segment_runs(chunk):
        blocks = key_and_value_blocks(chunk, segments, masked)
        for tiles in tile_batches(chunk, segments):
            entry, is_used = tiles.entries()
            used = is_used.flatten().nonzero()[:, 0]
            here = partials[done : done + used.numel()]
            is_full = used.numel() == entry.numel()
            results = here if is_full else _Partials.empty(entry.numel(), *partials.out.shape[1:])
            _attend_tiles(chunk, segments, entry, blocks.index_select(0, tiles.segment), masked, results)
            if not is_full:
                here.take(results, used)
            place[segments.order[entry.flatten()[used]]] = torch.arange(done, done + used.numel())
            done += used.numel()
    return place


def _attend_tiles(
    chunk: Chunk,
    segments: Segments,
    entry: torch.Tensor,
    blocks: torch.Tensor,
    masked: bool,
    results: _Partials,
) -> None:
    """Each tile's queries over its block, into ``results``.

    entry: int64 [num_tiles, pairs_per_tile], sorted pairs; what unused places give is dropped.
    blocks: float32 [num_tiles, block_size * (head_dim + value_dim)].
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


def _merge(chunk: Chunk, partials: _Partials, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

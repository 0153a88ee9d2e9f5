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

    ``out`` [num_pairs, heads_per_unit, value_dim] and ``lse`` [num_pairs, heads_per_unit].
    """

    out: torch.Tensor
    lse: torch.Tensor

    def __getitem__(self, part: slice) -> "_Partials":
        return _Partials(self.out[part], self.lse[part])

    def take(self, out: torch.Tensor, lse: torch.Tensor, used: torch.Tensor | None) -> None:
        """Keep the ``used`` pairs of a batch of tiles, None for all, of any shape with the right size."""
        for kept, x in ((self.out, out), (self.lse, lse)):
            if used is None:
                kept.copy_(x.view(kept.shape))
            else:
                torch.index_select(x.view(-1, *kept.shape[1:]), 0, used, out=kept)


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
    scratch = Scratch()
    workspace = _Partials(
        torch.empty(most_pairs, heads_per_unit, p.value_dim), torch.empty(most_pairs, heads_per_unit)
    )
    for part in cut:
        chunk = chunk_of(p, part, q, k, v, block_indices, cu_seqlens_k, scratch)
        partials = workspace[: part.num_pairs]
        place = _attend_chunk(chunk, partials, scratch)
        out[part.tokens, part.q_heads], lse[part.tokens, part.q_heads] = _merge(chunk, partials, place)
    return out, lse


def _attend_chunk(chunk: Chunk, partials: _Partials, scratch: Scratch) -> torch.Tensor:
    """Fill ``partials`` with every pair's own; returns where each pair lies in them, int64 [num_pairs]."""
    entries: list[torch.Tensor] = []
    done = 0
    for segments, masked in segment_runs(chunk):
        blocks = key_and_value_blocks(chunk, segments, masked)
        for tiles in tile_batches(chunk, segments):
            out, lse = _attend_tiles(chunk, segments, tiles, blocks, masked, scratch)
            entry, used = tiles.entry.flatten(), None
            if tiles.is_used is not None:
                used = tiles.is_used.flatten().nonzero()[:, 0]
                entry = entry[used]
            partials[done : done + entry.numel()].take(out, lse, used)
            entries.append(entry)
            done += entry.numel()
    return places(segments, entries)


def _attend_tiles(
    chunk: Chunk,
    segments: Segments,
    tiles: Tiles,
    blocks: torch.Tensor,
    masked: bool,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's queries over its block: out [num_tiles, rows, value_dim], lse [num_tiles, rows].

    A row is a pair under a head; what the rows of unused places get is to be dropped. blocks: float32
    [num_segments, block_size * (head_dim + value_dim)].
    """
    p, (size, pairs_per_tile) = chunk.problem, tiles.entry.shape
    rows = (size, pairs_per_tile * chunk.layout.heads_per_unit)
    of_tile = scratch.take("blocks", size, blocks.shape[1])
    torch.index_select(blocks, 0, tiles.segment, out=of_tile)
    k, v = of_tile.view(size, p.block_size, -1).split((p.head_dim, p.value_dim), dim=-1)
    q = scratch.take("q", size * pairs_per_tile, chunk.q.shape[1])
    torch.index_select(chunk.q, 0, segments.q_row.index_select(0, tiles.entry.flatten()), out=q)
    bias = None
    if masked:
        num_visible = segments.num_visible[tiles.entry].repeat_interleave(chunk.layout.heads_per_unit, dim=1)
        is_hidden = torch.arange(p.block_size) >= num_visible[..., None]
        bias = scratch.take("bias", *is_hidden.shape).zero_().masked_fill_(is_hidden, -torch.inf)
    attend = _attend_fused if p.head_dim == p.value_dim else _attend_by_products
    return attend(q.view(*rows, p.head_dim), k, v, bias, p.softmax_scale)


def _attend_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's attention of the CPU, called by the name under which it gives the log-sum-exp as well.

    Scores stay in the cache, and threads meet once. Dims of keys and of values must be equal.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=None if bias is None else bias[:, None], scale=scale
    )
    return out[:, 0], lse[:, 0]


def _attend_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    return torch.bmm(scores.sub_(lse[..., None]).exp_(), v), lse


def _merge(chunk: Chunk, partials: _Partials, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh each token's partial answers by their share of its softmax, and add them in slot order.

    place: where each pair lies in ``partials``. An embedding bag is exactly this: a weighted sum of rows,
    added one after the other.
    """
    p, heads, count = chunk.problem, chunk.layout.heads_per_unit, chunk.pairs.count
    num_rows, num_pairs = count.numel(), place.numel()
    first = count.cumsum(0) - count
    row = torch.arange(num_rows).repeat_interleave(count)
    weight = partials.lse.index_select(0, place)
    row_max = torch.full((num_rows, heads), -torch.inf)
    row_max.scatter_reduce_(0, row[:, None].expand_as(weight), weight, "amax")
    weight.sub_(row_max.index_select(0, row)).exp_()
    row_sum = F.embedding_bag(torch.arange(num_pairs), weight, first, mode="sum")
    weight /= row_sum.index_select(0, row)
    # A bag is a row under a head, all rows of a head before the next.
    head = torch.arange(heads)[:, None]
    out = F.embedding_bag(
        (place * heads + head).flatten(),
        partials.out.view(-1, p.value_dim),
        (first + head * num_pairs).flatten(),
        mode="sum",
        per_sample_weights=weight.t().flatten(),
    )
    lse = (row_max + row_sum.log()).view(chunk.num_units, -1, heads)
    return (
        out.view(heads, chunk.num_units, -1, p.value_dim).permute(2, 1, 0, 3).flatten(1, 2),
        lse.transpose(0, 1).flatten(1, 2),
    )

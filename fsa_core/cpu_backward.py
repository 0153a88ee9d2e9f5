"""Gradients of selected attention on the CPU: the tiles of the forward pass, five products each.

With delta = sum(out * grad_out) - grad_lse a row, and P = exp(scale * q k^T - lse) a tile:

    grad_v = P^T grad_out      dP = grad_out v^T      dS = scale * P * (dP - delta)
    grad_q = dS k              grad_k = dS^T q

The tiles of a block are added one after the other, and so are a token's slots. That, and what ``cpu`` says of
its tiles, makes a sequence's gradients bitwise the same alone and in any company. Arithmetic is float32.

A NaN may reach the gradients of every query that selected its block, and of every key of their blocks.
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
class _Rows:
    """What the backward pass knows of each query, float32, and zeros in a last row for unused places.

    A row is a token under a unit: ``q``, scaled, [num_rows + 1, heads_per_unit * head_dim], ``grad_out``
    [num_rows + 1, heads_per_unit * value_dim], ``lse`` and ``delta`` [num_rows + 1, heads_per_unit].
    """

    q: torch.Tensor
    grad_out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


def selected_attention_cpu_backward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    *,
    workspace_limit_bytes: int = CPU_WORKSPACE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtypes; every tensor contiguous and on the CPU.

    Problem, operands and answer as in ``selected_attention_cpu``; grad_out [num_q_tokens, num_q_heads,
    value_dim] in q's dtype, grad_lse float32 [num_q_tokens, num_q_heads]. A token without keys has no
    gradient and gives none. The workspace stays near ``workspace_limit_bytes`` (one token under one head may
    need more), beside the gradients in float32.
    """
    p, heads_per_unit = problem, Layout.of(problem).heads_per_unit
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    cut = parts(
        p,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        pair_bytes=4 * heads_per_unit * p.head_dim,
        token_bytes=8 * p.group_size * (p.head_dim + p.value_dim),
        limit_bytes=workspace_limit_bytes,
    )
    most_pairs = max((part.num_pairs for part in cut), default=0)
    workspace = q.new_empty(most_pairs, heads_per_unit, p.head_dim, dtype=torch.float32)
    scratch = Scratch()
    for part in cut:
        chunk = chunk_of(p, part, q, k, v, block_indices, cu_seqlens_k, scratch)
        rows = _rows(chunk, *(x[part.tokens, part.q_heads] for x in (out, lse, grad_out, grad_lse)))
        partial_grad_q = workspace[: part.num_pairs]
        place = _fill(chunk, rows, partial_grad_q, grad_k, grad_v, scratch)
        grad_q[part.tokens, part.q_heads] = _summed(chunk, partial_grad_q, place)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _rows(
    chunk: Chunk, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> _Rows:
    heads = chunk.layout.heads_per_unit
    grad_out = grad_out.float()
    delta = (out * grad_out).sum(-1) - grad_lse
    rows = (chunk.q, grad_out.reshape(len(chunk.q), -1), lse.reshape(-1, heads), delta.view(-1, heads))
    return _Rows(*(F.pad(x, (0, 0, 0, 1)) for x in rows))


def _fill(
    chunk: Chunk,
    rows: _Rows,
    partial_grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    scratch: Scratch,
) -> torch.Tensor:
    """Fill ``partial_grad_q`` with every pair's own; add to ``grad_k`` and ``grad_v`` what each block gets.

    Returns where each pair lies in ``partial_grad_q``, int64 [num_pairs].
    """
    p, done = chunk.problem, 0
    entries: list[torch.Tensor] = []
    for segments, masked in segment_runs(chunk):
        blocks = key_and_value_blocks(chunk, segments, masked, scratch)
        of_keys, of_values = (
            blocks.new_zeros(len(blocks), p.block_size, x) for x in (p.head_dim, p.value_dim)
        )
        for tiles in tile_batches(chunk, segments):
            entry = tiles.entry.flatten()
            used = None if tiles.is_used is None else tiles.is_used.flatten().nonzero()[:, 0]
            num_used = entry.numel() if used is None else used.numel()
            here = partial_grad_q[done : done + num_used]
            of_queries = here if used is None else here.new_empty(entry.numel(), *here.shape[1:])
            tile_blocks = blocks.index_select(0, tiles.segment)
            of_tile_keys, of_tile_values = _differentiate(
                chunk, segments, rows, tiles, tile_blocks, masked, of_queries
            )
            if used is not None:
                torch.index_select(of_queries, 0, used, out=here)
                entry = entry[used]
            # One tile after the other: how they fall into batches must leave no trace.
            of_keys.index_add_(0, tiles.segment, of_tile_keys)
            of_values.index_add_(0, tiles.segment, of_tile_values)
            entries.append(entry)
            done += num_used
        _add_blocks(p, segments, of_keys, grad_k)
        _add_blocks(p, segments, of_values, grad_v)
    return places(segments, entries)


def _differentiate(
    chunk: Chunk,
    segments: Segments,
    rows: _Rows,
    tiles: Tiles,
    blocks: torch.Tensor,
    masked: bool,
    of_queries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each tile gives the gradients of its keys [num_tiles, block_size, head_dim] and of its values.

    What it gives those of its queries, but for the softmax scale, goes into ``of_queries`` [num_tiles *
    pairs_per_tile, heads_per_unit, head_dim]. blocks: float32 [num_tiles, block_size * (head_dim +
    value_dim)].
    """
    p, entry, heads = chunk.problem, tiles.entry, chunk.layout.heads_per_unit
    size = len(entry)
    k, v = blocks.view(size, p.block_size, -1).split((p.head_dim, p.value_dim), dim=-1)
    row = segments.q_row[entry].flatten()
    if tiles.is_used is not None:
        row = row.where(tiles.is_used.flatten(), len(rows.lse) - 1)
    q, grad_out, lse, delta = (
        x.index_select(0, row).view(size, entry.shape[1] * heads, -1)
        for x in (rows.q, rows.grad_out, rows.lse, rows.delta)
    )
    scores = torch.bmm(q, k.transpose(1, 2))
    if masked:
        num_visible = segments.num_visible[entry].repeat_interleave(heads, dim=1)
        key = torch.arange(p.block_size, device=scores.device)
        scores.masked_fill_(key >= num_visible[..., None], -torch.inf)
    weights = scores.sub_(lse).exp_()
    of_values = torch.bmm(weights.transpose(1, 2), grad_out)
    of_scores = torch.bmm(grad_out, v.transpose(1, 2)).sub_(delta).mul_(weights)
    torch.bmm(of_scores, k, out=of_queries.view(q.shape))
    return torch.bmm(of_scores.transpose(1, 2), q), of_values


def _add_blocks(problem: Problem, segments: Segments, of_blocks: torch.Tensor, grad: torch.Tensor) -> None:
    """Add to ``grad`` [num_k_tokens, num_kv_heads, dim] what each segment's block [block_size, dim] gets."""
    key = segments.first_key[:, None] + torch.arange(problem.block_size, device=segments.first_key.device)
    row = key * problem.num_kv_heads + segments.kv_head[:, None]
    # Where a sequence has ended, a NaN may stand for the zero that another's key would get.
    inside = (key < segments.end_key[:, None]).flatten().nonzero()[:, 0]
    dim = grad.shape[-1]
    grad.view(-1, dim).index_add_(0, row.flatten()[inside], of_blocks.view(-1, dim)[inside])


def _summed(chunk: Chunk, partial_grad_q: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Add up the slots of each token, one after the other: float32 [num_tokens, num_heads, head_dim]."""
    p, count = chunk.problem, chunk.pairs.count
    first = count.cumsum(0) - count
    grad_q = F.embedding_bag(place, partial_grad_q.flatten(1), first, mode="sum").mul_(p.softmax_scale)
    grad_q = grad_q.view(chunk.num_units, -1, *partial_grad_q.shape[1:])
    return grad_q.transpose(0, 1).flatten(1, 2)

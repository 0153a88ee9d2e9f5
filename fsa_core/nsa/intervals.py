"""Attention in which a query sees one run of its sequence's keys: compressed and sliding-window attention.

Streamed: queries are taken in chunks, each against the keys that its queries span, so the scores held at once
stay within a bound. The backward pass computes them anew, chunk by chunk. It is a function of its own rather
than a checkpoint a chunk: autograd would give every chunk a gradient of all keys, and add them up.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fsa_core.autocast import in_own_precision
from fsa_core.autograd import Answer, Gradients, differentiated_once, without_keyless
from fsa_core.packing import fresh

# More rows amortise nothing more, and under a window they only widen the span of keys.
MAX_ROWS = 256
# Scores, weights and their gradients: what a chunk holds for each (head, query, key) at its worst.
FLOATS_A_SCORE = 3


@dataclass(frozen=True, slots=True)
class Intervals:
    """Query t sees the keys [first[t], end[t]) of its own sequence; int64 [num_q_tokens].

    Neither decreases within a sequence. ``cu_seqlens_q`` and ``cu_seqlens_k`` are as lists.
    """

    first: torch.Tensor
    end: torch.Tensor
    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries ``rows`` against ``keys``, and which of these each sees: bool [rows, keys]."""

    rows: slice
    keys: slice
    visible: torch.Tensor


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    softmax_scale: float,
    workspace_limit_bytes: int,
) -> Answer:
    """softmax(q k^T * softmax_scale) v over each query's interval of keys; differentiable, out and lse.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim]. Returns out [num_q_tokens, num_q_heads, value_dim] in q's
    dtype, lse float32 [num_q_tokens, num_q_heads]; an empty interval gives 0 and -inf. Sums are float32. The
    scores held at once take at most ``workspace_limit_bytes``, or one query's if that is more.
    """
    answer: Answer = _IntervalAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, intervals, softmax_scale, workspace_limit_bytes
    )
    return answer


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        intervals: Intervals,
        softmax_scale: float,
        workspace_limit_bytes: int,
    ) -> Answer:
        out, lse = _attend(q, k, v, intervals, softmax_scale, workspace_limit_bytes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.intervals = intervals
        ctx.softmax_scale = softmax_scale
        ctx.workspace_limit_bytes = workspace_limit_bytes
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor, d_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options = (ctx.intervals, ctx.softmax_scale, ctx.workspace_limit_bytes)
        *operands, lse = ctx.saved_tensors
        given = (*operands, lse, d_out, without_keyless(d_lse, lse))
        return *differentiated_once(_gradients, *options, *given), None, None, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    softmax_scale: float,
    workspace_limit_bytes: int,
) -> Answer:
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=_sum_dtype(q), device=q.device)
    for chunk in _chunks(intervals, q.shape[1], workspace_limit_bytes):
        rows, keys = chunk.rows, chunk.keys
        scores = _scores(q[rows], k[keys], chunk.visible, softmax_scale)
        row_max = scores.amax(-1, keepdim=True)
        row_max.masked_fill_(row_max == -torch.inf, 0.0)
        weights = scores.sub_(row_max).exp2_()
        total = weights.sum(-1, keepdim=True)
        values = torch.bmm(weights, _by_head(v[keys])) / total.where(total > 0, 1.0)
        out[rows] = _ungrouped(values, len(q[rows]))
        lse[rows] = _ungrouped((row_max + total.log2()) * math.log(2), len(q[rows]))[..., 0]
    return out, lse


@in_own_precision
def _gradients(
    intervals: Intervals,
    softmax_scale: float,
    workspace_limit_bytes: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
) -> Gradients:
    dq = torch.zeros_like(q)
    # Chunks overlap in their keys: these are sums.
    dk, dv = (torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device) for x in (k, v))
    for chunk in _chunks(intervals, q.shape[1], workspace_limit_bytes):
        rows, keys = chunk.rows, chunk.keys
        num_kv_heads, num_rows = k.shape[1], len(q[rows])
        # Where nothing is seen, whatever is given has no effect, and any finite lse keeps the weights zeros.
        is_keyless = lse[rows] == -torch.inf
        given, lse_rows = (
            d_out[rows].masked_fill(is_keyless[..., None], 0.0),
            lse[rows].masked_fill(is_keyless, 0.0),
        )
        q_rows, d_out_rows = (_grouped(x, num_kv_heads) for x in (q[rows], given))
        # d_lse moves every score by its weight, and so does -sum(d_out * out).
        shift = d_lse[rows] - (given.to(lse.dtype) * out[rows]).sum(-1)
        weights = _scores(q[rows], k[keys], chunk.visible, softmax_scale)
        weights.sub_(_grouped(lse_rows[..., None], num_kv_heads) / math.log(2)).exp2_()
        dv[keys] += torch.bmm(weights.transpose(1, 2), d_out_rows).transpose(0, 1)
        d_scores = torch.bmm(d_out_rows, _by_head(v[keys]).transpose(1, 2))
        d_scores.add_(_grouped(shift[..., None], num_kv_heads)).mul_(weights).mul_(softmax_scale)
        dq[rows] = _ungrouped(torch.bmm(d_scores, _by_head(k[keys])), num_rows)
        dk[keys] += torch.bmm(d_scores.transpose(1, 2), q_rows).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _chunks(intervals: Intervals, num_q_heads: int, limit_bytes: int) -> Iterator[_Chunk]:
    """Cut every sequence's queries, those that see something, into chunks within the limit."""
    spans = (itertools.pairwise(x) for x in (intervals.cu_seqlens_q, intervals.cu_seqlens_k))
    score_bytes = FLOATS_A_SCORE * 4 * num_q_heads
    for (q_start, q_end), (k_start, _) in zip(*spans, strict=True):
        start = q_start
        while start < q_end:
            stop = min(start + MAX_ROWS, q_end)
            # The keys that the longest possible chunk spans: a shorter one spans no more.
            span = int(intervals.end[stop - 1] - intervals.first[start])
            stop = min(stop, start + max(limit_bytes // (score_bytes * max(span, 1)), 1))
            first, end = int(intervals.first[start]), int(intervals.end[stop - 1])
            rows = slice(start, stop)
            if end > first:
                key = torch.arange(first, end, device=intervals.first.device)
                visible = (key >= intervals.first[rows, None]) & (key < intervals.end[rows, None])
                yield _Chunk(rows, slice(k_start + first, k_start + end), visible)
            start = stop


def _scores(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Base-2 scores [num_kv_heads, group * rows, keys], -inf where not visible.

    q: [rows, num_q_heads, head_dim], k: [keys, num_kv_heads, head_dim], visible: bool [rows, keys].
    """
    scores = torch.bmm(_grouped(q, k.shape[1]), _by_head(k).transpose(1, 2))
    scores.mul_(softmax_scale / math.log(2))
    scores.unflatten(1, (-1, len(q))).masked_fill_(~visible, -torch.inf)
    return scores


def _grouped(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[rows, num_q_heads, dim] as [num_kv_heads, group * rows, dim], to multiply with keys of a KV head."""
    return fresh(x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3), _sum_dtype(x)).flatten(1, 2)


def _ungrouped(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The inverse of ``_grouped``: [rows, num_q_heads, dim]."""
    by_group: torch.Tensor = x.unflatten(1, (-1, num_rows))
    return by_group.permute(2, 0, 1, 3).flatten(1, 2)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[keys, heads, dim] as [heads, keys, dim]."""
    return fresh(x.transpose(0, 1), _sum_dtype(x))


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

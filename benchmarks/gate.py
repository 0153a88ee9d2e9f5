"""The correctness gate: how far an answer is from float64, on a sample that any length can afford.

A few query tokens are attended straight from the definition. Of the backward pass, their rows of dq are
checked, and whole blocks of dk and dv: a block's gradients come from the tokens that chose it and no others,
so they are exact without a table of tokens by keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.cases import Stage
from benchmarks.inputs import Inputs

# The keys that a token attends: up to itself those of its selected blocks, or all; or all of its piece of the
# sequence, before and after it, where a piece has as many keys as a row of indices with all its slots.
Reach = Literal["selected", "causal", "piece"]

# Elements of gathered keys or values at a time.
GATHERED_AT_ONCE = 1 << 26
RANDOM_TOKENS = 9


@dataclass(frozen=True, slots=True)
class Sample:
    """Part of an answer in float64: some rows under some heads of its tensor ``number``.

    ``sizes`` [rows, heads] is what an error is measured by: the row's norm, or more where even the true
    output, rounded, would be further off.
    """

    number: int
    rows: torch.Tensor
    heads: torch.Tensor
    values: torch.Tensor
    sizes: torch.Tensor


def worst_error(answer: tuple[torch.Tensor, ...], truth: list[Sample]) -> float:
    """The largest relative error of a row (a token or key under a head); NaN if any row has one.

    Rows that happen to be near zero are measured by the typical row of their sample.
    """
    errors = []
    for sample in truth:
        got = answer[sample.number][sample.rows[:, None], sample.heads].double()
        floor = sample.sizes.median().clamp(min=torch.finfo(torch.float64).tiny)
        errors.append(((got - sample.values).norm(dim=-1) / sample.sizes.maximum(floor)).max())
    return torch.stack(errors).max().item()


def sampled_truth(x: Inputs, stage: Stage, reach: Reach = "selected") -> list[Sample]:
    """Of (out,) or (dq, dk, dv), over the keys within ``reach``.

    An inversion must give back the block indices themselves: [tokens, heads, slots].
    """
    if stage == "index":
        tokens, heads = (torch.arange(size, device=x.q.device) for size in (x.num_tokens, x.k.shape[1]))
        ids = x.block_indices.transpose(0, 1).double()
        return [Sample(0, tokens, heads, ids, ids.norm(dim=-1))]
    tokens = _sampled_tokens(x)
    heads = torch.arange(x.q.shape[1], device=x.q.device)
    if stage == "forward":
        out = _at(x, tokens, reach, lambda rows: rows.out)
        return [Sample(0, tokens, heads, out, out.norm(dim=-1))]
    grad_q = _at(x, tokens, reach, lambda rows: rows.grad_q)
    sizes = grad_q.norm(dim=-1) + _at(x, tokens, reach, lambda rows: rows.grad_q_of_rounding)[..., 0]
    samples = [Sample(0, tokens, heads, grad_q, sizes)]
    last = x.num_blocks - 1
    # Of causal attention to all, only the last block is attended by few tokens.
    for number, block in enumerate([last] if reach == "causal" else sorted({0, last // 2, last})):
        kv_head = number % x.k.shape[1]
        end = min((block + 1) * x.block_size, x.num_tokens)
        keys = torch.arange(block * x.block_size, end, device=x.q.device)
        head = torch.tensor([kv_head], device=x.q.device)
        for tensor, grad in enumerate(_block_gradients(x, kv_head, block, reach), start=1):
            values = grad[: len(keys), None]
            samples.append(Sample(tensor, keys, head, values, values.norm(dim=-1)))
    return samples


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some tokens under one KV head, attended: [rows, group, ...]; k and v are [rows, slots * block, ...]."""

    ids: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    grad_out: torch.Tensor
    scale: float

    @property
    def out(self) -> torch.Tensor:
        return self.weights @ self.v

    @property
    def grad_scores(self) -> torch.Tensor:
        """Of the products q k^T: p (dp - delta) times the softmax scale."""
        delta = (self.grad_out * self.out).sum(-1, keepdim=True)
        return self.weights * (self.grad_out @ self.v.mT - delta) * self.scale

    @property
    def grad_q(self) -> torch.Tensor:
        return self.grad_scores @ self.k

    @property
    def grad_q_of_rounding(self) -> torch.Tensor:
        """What dq moves by, a unit of relative error in out: delta is the product of dout and out."""
        delta_error = self.grad_out.norm(dim=-1, keepdim=True) * self.out.norm(dim=-1, keepdim=True)
        return delta_error * (self.weights @ self.k).norm(dim=-1, keepdim=True) * self.scale


def _sampled_tokens(x: Inputs) -> torch.Tensor:
    """The edges of the sequence and of a block, and a few more."""
    n, b = x.num_tokens, x.block_size
    generator = torch.Generator().manual_seed(n)
    edges = torch.tensor([0, 1, b - 1, b, n // 3, n // 2, n - 1])
    return torch.cat([edges, torch.randint(n, (RANDOM_TOKENS,), generator=generator)]).unique().to(x.q.device)


def _at(x: Inputs, tokens: torch.Tensor, reach: Reach, part: Callable[[_Rows], torch.Tensor]) -> torch.Tensor:
    """``part`` of every query head at ``tokens``: [tokens, q heads, dim]."""
    per_head = (_attended(x, kv_head, tokens, reach) for kv_head in range(x.k.shape[1]))
    return torch.cat([torch.cat([part(rows) for rows in pieces]) for pieces in per_head], dim=1)


def _block_gradients(x: Inputs, kv_head: int, block: int, reach: Reach) -> tuple[torch.Tensor, torch.Tensor]:
    """dk [block size, dim] and dv [block size, value dim] of a block, from all tokens that attend it."""
    grad_k, grad_v = (
        torch.zeros(x.block_size, t.shape[2], dtype=torch.float64, device=t.device) for t in (x.k, x.v)
    )
    first_key = block * x.block_size
    if reach == "causal":
        choosers = torch.arange(first_key, x.num_tokens, device=x.q.device)
    elif reach == "piece":
        start = first_key // x.keys_of_row * x.keys_of_row
        choosers = torch.arange(start, min(start + x.keys_of_row, x.num_tokens), device=x.q.device)
    else:
        choosers = (x.block_indices[kv_head] == block).any(-1).nonzero().flatten()
    for rows in _attended(x, kv_head, choosers, reach):
        row, slot = (rows.ids == block).nonzero(as_tuple=True)
        grad_scores, weights = (
            t.unflatten(-1, (-1, x.block_size))[row, :, slot].flatten(0, 1)
            for t in (rows.grad_scores, rows.weights)
        )
        grad_k += grad_scores.T @ rows.q.flatten(0, 1)
        grad_v += weights.T @ rows.grad_out.flatten(0, 1)
    return grad_k, grad_v


def _attended(x: Inputs, kv_head: int, tokens: torch.Tensor, reach: Reach) -> Iterator[_Rows]:
    """Plain softmax attention of ``tokens``, some at a time."""
    slots = x.num_blocks if reach == "causal" else x.block_indices.shape[2]
    gathered = slots * x.block_size * max(x.k.shape[2], x.v.shape[2])
    heads = slice(kv_head * x.group_size, (kv_head + 1) * x.group_size)
    within = torch.arange(x.block_size, device=x.q.device)
    for some in tokens.split(max(GATHERED_AT_ONCE // gathered, 1)):
        ids, ends = _within_reach(x, kv_head, some, reach)
        keys = (ids[:, :, None] * x.block_size + within).flatten(1)
        visible = (ids >= 0).repeat_interleave(x.block_size, dim=1) & (keys < ends[:, None])
        keys = keys.clamp(0, x.num_tokens - 1)
        q, grad_out = x.q[some, heads].double(), x.grad_out[some, heads].double()
        k, v = x.k[keys, kv_head].double(), x.v[keys, kv_head].double()
        scores = (q @ k.mT * x.softmax_scale).masked_fill(~visible[:, None], -torch.inf)
        # A token without keys gives zeros.
        weights = scores.softmax(-1).nan_to_num(0.0)
        yield _Rows(ids, q, k, v, weights, grad_out, x.softmax_scale)


def _within_reach(
    x: Inputs, kv_head: int, tokens: torch.Tensor, reach: Reach
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [tokens, slots] with the keys of ``tokens``, -1: none; the keys [tokens] they stop before."""
    if reach == "piece":
        starts = tokens // x.keys_of_row * x.keys_of_row
        slots = torch.arange(x.block_indices.shape[2], device=x.q.device)
        ends = (starts + x.keys_of_row).clamp(max=x.num_tokens)
        return starts[:, None] // x.block_size + slots, ends
    if reach == "causal":
        ids = torch.arange(x.num_blocks, device=x.q.device).expand(len(tokens), -1)
    else:
        ids = x.block_indices[kv_head, tokens].long()
    return ids, tokens + 1

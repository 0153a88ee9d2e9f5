"""How the CPU backend cuts a call into parts: query tokens and KV heads that the workspace has room for.

What shapes a sequence's parts never comes from outside it: they are cut from the start of each sequence and
count only slots that are in use.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fsa_core.packing import Placement, place_queries
from fsa_core.problem import Problem

# A thread's. The answer costs first touches of fresh memory as much as arithmetic, so the workspace is small
# and reused.
CPU_WORKSPACE_BYTES = 32 * 2**20
# A pair's numbers in the index.
INDEX_BYTES = 128
_INDEX_ROWS_AT_ONCE = 65536


@dataclass(frozen=True, slots=True)
class Layout:
    """What a (token, slot) pair means in this call.

    A unit owns a list of selected blocks: a KV head, or a query head when each selects for itself.
    ``heads_per_unit`` query heads ride with every pair.
    """

    units_per_kv_head: int
    heads_per_unit: int

    @classmethod
    def of(cls, problem: Problem) -> "Layout":
        units = max(problem.index_heads, problem.num_kv_heads)
        return cls(
            units_per_kv_head=units // problem.num_kv_heads, heads_per_unit=problem.num_q_heads // units
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Query tokens under KV heads that share one pass through the workspace; ``placed`` are its tokens."""

    tokens: slice
    kv_heads: slice
    q_heads: slice
    num_pairs: int
    placed: Placement


def parts(
    problem: Problem,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    pair_bytes: int,
    token_bytes: int,
    limit_bytes: int,
) -> list[Part]:
    """Cut the call into parts whose workspace fits the limit, all tokens of a head before the next.

    A pair takes ``pair_bytes`` of workspace beside its ``INDEX_BYTES``, and a token under a KV head
    ``token_bytes``. Sequences are cut into pieces by their own slots alone, and two pieces of one never share
    a part, so that tiles do not depend on what else is in the batch. Parts without a pair are left out.
    """
    p, heads = problem, problem.num_kv_heads
    if not p.num_q_tokens:
        return []
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, p.num_q_tokens, causal=p.causal)
    num_pairs = _pairs_per_token(p, block_indices, placed)
    cost = num_pairs.amax(0) * (INDEX_BYTES + pair_bytes) + token_bytes
    cut = []
    for tokens, run_bytes in _runs(cost, placed.sequence, limit_bytes, limit_bytes // heads):
        at_once = min(max(limit_bytes // run_bytes, 1), heads)
        here = Placement(placed.sequence[tokens], placed.position[tokens], placed.num_visible_keys[tokens])
        for first in range(0, heads, at_once):
            kv_heads = slice(first, min(first + at_once, heads))
            if part_pairs := int(num_pairs[kv_heads, tokens].sum()):
                q_heads = slice(first * p.group_size, kv_heads.stop * p.group_size)
                cut.append(Part(tokens, kv_heads, q_heads, part_pairs, here))
    return cut


def _pairs_per_token(problem: Problem, block_indices: torch.Tensor, placed: Placement) -> torch.Tensor:
    """int64 [num_kv_heads, num_q_tokens]: the used slots of each token under each KV head."""
    rows = zip(
        block_indices.split(_INDEX_ROWS_AT_ONCE, dim=1),
        placed.num_visible_keys.split(_INDEX_ROWS_AT_ONCE),
        strict=True,
    )
    counts = torch.cat([is_used(problem, ids, visible).sum(-1) for ids, visible in rows], dim=1)
    if problem.index_heads < problem.num_kv_heads:
        return counts.expand(problem.num_kv_heads, -1)
    per_kv_head = problem.index_heads // problem.num_kv_heads
    return counts.view(problem.num_kv_heads, per_kv_head, problem.num_q_tokens).sum(1)


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


def is_used(problem: Problem, block_indices: torch.Tensor, num_visible_keys: torch.Tensor) -> torch.Tensor:
    """Which slots [heads, tokens, slots] hold a block of which the token may see a key."""
    num_visible_blocks = -(-num_visible_keys // problem.block_size)
    return (block_indices >= 0) & (block_indices < num_visible_blocks[:, None])

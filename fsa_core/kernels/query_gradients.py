"""The gradient of q, where those of keys are made apart: with the blocks that neighbours share, tile by tile.

With P = exp(scores - lse) made again from q, k and lse, and delta = sum(out * grad_out) - grad_lse:

    grad_q = (P * (grad_out v^T - delta)) k * scale

Stages, as the path of the plan says and as the forward pass has them:

1. of tiles: a query tile walks the blocks that its tokens share (agreement.agree, or what the forward pass
   kept of it) under their masks, its gradients in registers, and writes them once; on Hopper it can make
   delta as well;
2. of pairs: for what is left, a work item loads its K/V block once and writes each pair's share of the
   gradient at the pair's own (token, slot);
3. sum: the shares of a token are added in the order of its slots, to what its tile gave.

No atomics, and a row's numbers depend on nothing but the row and its tile: the bits are the same on every run
and in any company.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fsa_core.kernels.agreement import Agreement, agree, index_pairs, new_agreement
from fsa_core.kernels.block_share import Operands
from fsa_core.kernels.delta import write_delta
from fsa_core.kernels.index import Inversion, new_inversion
from fsa_core.kernels.kept import kept_agreement
from fsa_core.kernels.launch import aside, rejoin
from fsa_core.kernels.pair_query_gradients import gradients_of_pairs
from fsa_core.kernels.replay import Memory
from fsa_core.kernels.tile_order import Tiles
from fsa_core.kernels.tile_query_gradients import gradients_of_tiles, tiles_make_delta, tiles_of_group
from fsa_core.plan import ForwardPlan, Group, groups
from fsa_core.problem import Problem


class QueryGradients:
    """Makes grad_q [total_q, q heads, head_dim] of some tile heads; their delta is in ``given``.

    block_indices int32 [index_heads, total_q, slots]. The plan is that of a forward pass whose values are at
    least as wide as keys: its partials are the shares. Buffers come from ``memory``. ``kept``: what tiles
    share, if the forward pass kept it (kept.py).
    """

    def __init__(
        self,
        problem: Problem,
        plan: ForwardPlan,
        heads: range,
        given: Operands,
        block_indices: torch.Tensor,
        grad_q: torch.Tensor,
        memory: Memory,
        kept: torch.Tensor | None = None,
    ) -> None:
        p, tile = problem, plan.query_tile
        self._problem, self._plan, self._given = problem, plan, given
        self._block_indices, self._grad_q = block_indices, grad_q
        self._groups = list(_groups_of(p, plan, heads))
        self._is_kept = kept is not None
        self._agreement: Agreement | None = None
        if kept is not None:
            self._agreement = kept_agreement(p, plan, kept, is_new=False)
        elif tile is not None:
            self._agreement = new_agreement(p, plan, tile, memory)
        kept_left = None if self._agreement is None else self._agreement.kept_left
        self._inversion: Inversion | None = None
        if plan.has_partials:
            self._inversion = new_inversion(plan, p.num_slots, memory, kept_left)
        num_shares = plan.buffers * plan.chunk_heads * plan.chunk_tokens * p.num_slots * plan.heads_per_pair
        self._shares = memory.new_empty(num_shares * plan.has_partials, p.head_dim)
        # What was listed ahead, until it is walked, and whether what is left was indexed too.
        self._ahead: tuple[Tiles | None, bool] | None = None

    def list_ahead(self, *, with_index: bool) -> None:
        """Finds what the tiles of the first group share, which takes no delta, before ``write`` asks.

        ``with_index``: and indexes what they leave, so that tiles are the first that ``write`` launches.
        """
        group = self._groups[0]
        self._ahead = (self._list(group), with_index)
        if with_index:
            self._index(group)

    def write(self, *, with_delta: bool) -> None:
        """Writes grad_q and, ``with_delta``, the delta of its rows; else that is there."""
        p, plan, tile, given = self._problem, self._plan, self._plan.query_tile, self._given
        agreement, inversion = self._agreement, self._inversion
        makes_delta = with_delta and tiles_make_delta(p, plan, self._grad_q.device)
        if with_delta and not makes_delta:
            write_delta(given.out, given.grad_out, given.grad_lse, given.delta, given.first_delta_head)
        for group in self._groups:
            (tiles, is_indexed), self._ahead = self._ahead or (self._list(group), False), None
            if not is_indexed:
                with aside():
                    self._index(group)
            if tile is not None and tiles is not None:
                gradients_of_tiles(p, plan, tile, group, tiles, given, self._grad_q, makes_delta=makes_delta)
            if inversion is not None:
                used = inversion.ranks if agreement is None else agreement.leftover
                rejoin()
                gradients_of_pairs(p, plan, group, inversion, used, self._shares, given, self._grad_q)

    def _list(self, group: Group) -> Tiles | None:
        p, plan, tile, given = self._problem, self._plan, self._plan.query_tile, self._given
        if tile is None or self._agreement is None:
            return None
        if not self._is_kept:
            agree(self._agreement, p, plan, tile, group, self._block_indices, *given.starts, self._inversion)
        return tiles_of_group(p, plan, tile, group, self._agreement, given, are_kept=self._is_kept)

    def _index(self, group: Group) -> None:
        if self._inversion is not None:
            index_pairs(
                self._inversion, self._agreement, self._problem, self._plan, group, self._block_indices,
                *self._given.starts,
            )  # fmt: skip


def _groups_of(problem: Problem, plan: ForwardPlan, heads: range) -> Iterator[Group]:
    """What the plan's groups have of some tile heads."""
    for group in groups(problem, plan):
        first = max(group.first_head, heads.start)
        num_heads = min(group.first_head + group.num_heads, heads.stop) - first
        if num_heads > 0:
            index = (first, num_heads) if plan.index_per_head else (0, 1)
            yield replace(
                group,
                first_head=first,
                num_heads=num_heads,
                first_index_head=index[0],
                num_index_heads=index[1],
            )

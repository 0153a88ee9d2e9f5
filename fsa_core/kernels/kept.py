"""What a forward pass keeps for its gradients: what query tiles share, which they would have to find again.

Lists are a small part of what a training step keeps anyway: at 64K tokens and 4 KV heads 23 to 34 MB, or 51
on path "query_tile", beside 134 of q and out for each query head of a group. They are kept in one tensor, for
which autograd has to ask once.
"""

from dataclasses import dataclass
from math import prod

import torch

from fsa_core.backward_plan import BackwardPlan
from fsa_core.kernels.agreement import Agreement, new_agreement
from fsa_core.kernels.replay import BUFFER_ALIGNMENT, clear
from fsa_core.plan import ForwardPlan, groups
from fsa_core.problem import Problem

# Of the workspace that a call may take, the part that may outlast it.
PART_KEPT = 4


@dataclass(slots=True)
class _Carved:
    """Makes tensors one behind the other in ``piece``, uint8; or only counts their bytes, if it is None.

    ``is_new``: what begins as zeros is cleared; else it was, and what has been written since is there.
    """

    device: torch.device
    piece: torch.Tensor | None
    is_new: bool
    num_bytes: int = 0

    def new_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        begin, size = self.num_bytes, prod(shape) * dtype.itemsize
        self.num_bytes += -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        if self.piece is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self.piece[begin : begin + size].view(dtype).view(shape)

    def new_zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        x = self.new_empty(*shape, dtype=dtype)
        if self.is_new:
            clear(x)
        return x


def kept_agreement(problem: Problem, plan: ForwardPlan, piece: torch.Tensor, *, is_new: bool) -> Agreement:
    """What the tiles of all tokens share, in ``piece``, uint8 [kept_bytes]: to be found, or found before."""
    assert plan.query_tile is not None
    carved = _Carved(piece.device, piece, is_new)
    return new_agreement(problem, plan, plan.query_tile, carved, is_kept=True)


def kept_bytes(
    problem: Problem, device: torch.device, plan: ForwardPlan, backward: BackwardPlan, limit_bytes: int
) -> int:
    """How much is kept of a call whose gradients walk the tiles of the forward pass; 0 if they do not.

    They do where both take the same tiles of all tokens in one group, and so find the same lists.
    """
    p, queries = problem, backward.queries
    tile = plan.query_tile
    if tile is None or tile.is_row or queries is None or backward.delta_heads < p.num_kv_heads:
        return 0
    if _lists(p, plan) is None or _lists(p, plan) != _lists(p, queries):
        return 0
    carved = _Carved(device, None, is_new=False)
    new_agreement(p, plan, tile, carved, is_kept=True)
    return carved.num_bytes if carved.num_bytes <= limit_bytes // PART_KEPT else 0


def _lists(problem: Problem, plan: ForwardPlan) -> tuple[object, ...] | None:
    """All that the lists of a plan and their sizes depend on, if they are of one group."""
    tile, all_groups = plan.query_tile, tuple(groups(problem, plan))
    if tile is None or len(all_groups) != 1:
        return None
    of_tile = (tile.tokens, tile.rows, tile.min_tokens, tile.most_blocks, tile.max_shared, tile.is_half)
    of_plan = (plan.group_tokens, plan.group_heads, plan.group_tiles, plan.index_per_head, plan.has_leftover)
    return *of_tile, *of_plan, all_groups[0]

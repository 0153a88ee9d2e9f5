"""In which order resident programs take the query tiles of a group of tokens: those that walk most first.

How many blocks a tile walks is what its tokens chose. Programs that take every so many-th tile are done at
different times: at 8K tokens, four heads a pair and real choices the last one takes 1.24 times the mean. So
tiles are sorted, a few thousand at a time so that a head's still come one after another, and programs take
them forth and back (``hopper_tiles.nth_work``). A tile's answer is its own: which of those that walk as much
comes first does not matter.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.launch import kernel
from fsa_core.kernels.tile_pairs import join_lists
from fsa_core.kernels.tile_tokens import tiles_of
from fsa_core.plan import ORDERED_TILES, STEP_BINS, Group
from fsa_core.problem import Problem
from fsa_core.tiles import QueryTile

# With more, programs' shares are nearly equal anyway, and tiles that run at a time lie farther apart.
MOST_ORDERED = 4096


@kernel
def _order(
    counts_ptr,
    order_ptr,
    begins_ptr,
    num_lists,
    num_asked,
    tiles_of_head,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Sorts TILES lists by how many blocks they have, most first; BINS - 1 and more count as the same.

    counts as of ``Agreement``; order int32 [lists]: head * num_asked + tile; begins int32 [programs, BINS].
    """
    first = tl.program_id(0) * TILES
    number = first + tl.arange(0, TILES)
    exists = number < num_lists
    place = number // num_asked * tiles_of_head + number % num_asked
    num_steps = tl.load(counts_ptr + place * 2 + 1, mask=exists, other=0)
    # What does not exist is counted in the last bin, behind which nothing begins.
    bins = BINS - 1 - tl.minimum(num_steps, BINS - 1)
    counts = tl.histogram(bins, BINS)
    begins_ptr += tl.program_id(0) * BINS
    tl.store(begins_ptr + tl.arange(0, BINS), tl.cumsum(counts, 0) - counts)
    tl.debug_barrier()
    at = tl.atomic_add(begins_ptr + bins, 1, mask=exists, sem="relaxed")
    tl.store(order_ptr + first + at, number, mask=exists)


@dataclass(frozen=True, slots=True)
class Tiles:
    """``number`` tiles of each head from tile ``first`` on, of ``of_head`` that a head has room for.

    lists: blocks, masks and counts as of ``Agreement``, or of ``tile_pairs.join_lists`` where tiles are taken
    two by two; behind them, for resident programs, the order to take tiles in, if ``is_ordered``.
    """

    lists: tuple[torch.Tensor, ...]
    first: int
    number: int
    of_head: int
    is_ordered: bool = False


def tiles_to_walk(
    agreement: Agreement,
    problem: Problem,
    tile: QueryTile,
    group: Group,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    are_resident: bool,
    are_kept: bool = False,
) -> Tiles:
    """What a group's tokens share, for a launch of a program a tile or of resident programs.

    ``are_kept``: an earlier pass had them for programs of the same kind, and joined and ordered them then.
    """
    lists = (agreement.blocks, agreement.masks, agreement.counts)
    first, number = tiles_of(problem, tile.tokens, group)
    if not are_resident:
        return Tiles(lists, first, number, lists[2].shape[1])
    if agreement.joined is not None:
        lists = agreement.joined
        first, number = tiles_of(problem, 2 * tile.tokens, group)
        if not are_kept:
            join_lists(agreement, problem, tile, group, cu_seqlens_q, cu_seqlens_k)
    assert agreement.order is not None
    order, begins = agreement.order
    num_lists, of_head = number * group.num_index_heads, lists[2].shape[1]
    is_ordered = num_lists <= MOST_ORDERED
    if is_ordered and not are_kept:
        _order[(-(-num_lists // ORDERED_TILES),)](
            lists[2], order, begins, num_lists, number, of_head, TILES=ORDERED_TILES, BINS=STEP_BINS,
            num_warps=8,
        )  # fmt: skip
    return Tiles((*lists, order), first, number, of_head, is_ordered)

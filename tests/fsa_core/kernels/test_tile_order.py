"""The order in which resident programs take tiles: every one once, those that walk most first."""

import pytest
import torch

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.tile_order import tiles_to_walk
from fsa_core.plan import ORDERED_TILES, STEP_BINS, Group
from fsa_core.problem import Problem
from fsa_core.tiles import QueryTile

TOKENS, MAX_SHARED = 2, 600


def _order(
    device: torch.device, heads: int, num_steps: torch.Tensor, first_token: int
) -> tuple[list[int], int]:
    """That of tiles of ``num_steps`` [heads, tiles] from ``first_token`` on; how many a head has of them."""
    tiles = num_steps.shape[1]
    num_tokens = TOKENS * (tiles - 2)
    end = first_token + num_tokens
    problem = Problem(end, end, 1, heads, heads, 16, 16, torch.float16, heads, 4, 16, True, 1.0)
    tile = QueryTile(TOKENS, 16, 16, 1, 64, MAX_SHARED, False, False, 1, 128, 1)
    group = Group(first_token, num_tokens, 0, heads, 0, heads)
    lists = heads, tiles, MAX_SHARED

    def empty(*shape: int) -> torch.Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    agreement = Agreement(
        blocks=empty(*lists), masks=empty(*lists).long(),
        counts=torch.stack((torch.zeros_like(num_steps), num_steps), 2).to(device),
        leftover=empty(heads, 0, 4), joined=None,
        order=(empty(heads * tiles), empty(-(-heads * tiles // ORDERED_TILES), STEP_BINS)),
    )  # fmt: skip
    walked = tiles_to_walk(agreement, problem, tile, group, empty(2), empty(2), are_resident=True)
    return walked.lists[-1][: heads * walked.number].tolist(), walked.number


@pytest.mark.parametrize(("heads", "tiles"), [(1, 3), (3, 40), (3, ORDERED_TILES // 2 + 7)])
@pytest.mark.parametrize("first_token", [0, 5 * TOKENS])
def test_those_that_walk_most_come_first(
    device: torch.device, heads: int, tiles: int, first_token: int
) -> None:
    generator = torch.Generator().manual_seed(tiles)
    num_steps = torch.randint(0, MAX_SHARED, (heads, tiles), generator=generator, dtype=torch.int32)
    order, asked = _order(device, heads, num_steps, first_token)
    assert sorted(order) == list(range(heads * asked))
    walked = [min(int(num_steps[number // asked, number % asked]), STEP_BINS - 1) for number in order]
    for start in range(0, len(order), ORDERED_TILES):
        part = slice(start, start + ORDERED_TILES)
        assert sorted(order[part]) == list(range(len(order)))[part]
        assert walked[part] == sorted(walked[part], reverse=True)

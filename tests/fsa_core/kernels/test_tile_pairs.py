"""The lists of two tiles as one, against Python's union of them."""

import random

import pytest
import torch

from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.tile_pairs import join_lists
from fsa_core.kernels.tile_tokens import tiles_of
from fsa_core.plan import Group
from fsa_core.problem import Problem
from fsa_core.tiles import QueryTile

TOKENS, MAX_SHARED, BLOCK_SIZE, HEADS = 4, 90, 16, 2


def draw_lists(tiles: int, num_blocks: int, seed: int) -> list[list[dict[int, int]]]:
    """Of each head and tile: the mask of each block."""
    draw = random.Random(seed)

    def one() -> dict[int, int]:
        count = draw.choice((0, 1, min(31, num_blocks), min(32, num_blocks), min(MAX_SHARED, num_blocks)))
        return {block: draw.randrange(1, 1 << 60) for block in sorted(draw.sample(range(num_blocks), count))}

    return [[one() for _ in range(tiles)] for _ in range(HEADS)]


@pytest.mark.parametrize(("tokens", "first_token"), [(40, 0), (33, 0), (64, 20)])
@pytest.mark.parametrize("num_blocks", [3, 100, 400])
def test_a_joint_list_has_each_block_once_with_the_masks_of_both(
    device: torch.device, tokens: int, first_token: int, num_blocks: int
) -> None:
    # Keys before the queries, so that there are so many blocks, and some are seen whole.
    num_keys = num_blocks * BLOCK_SIZE
    problem = Problem(
        tokens, num_keys, 1, HEADS, HEADS, 16, 16, torch.float16, HEADS, 4, BLOCK_SIZE, True, 1.0
    )  # fmt: skip
    tile = QueryTile(TOKENS, 16, 16, 1, 64, MAX_SHARED, False, True, 1, 128, 1)
    group = Group(first_token, tokens - first_token, 0, HEADS, 0, HEADS)
    first_tile = max(first_token // TOKENS - 1, 0)
    num_tiles = -(-tokens // TOKENS) - first_tile
    room = num_tiles + 2
    lists = draw_lists(num_tiles, num_blocks, seed=num_blocks + tokens)

    def full(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, -7, dtype=dtype, device=device)

    blocks, masks = full(HEADS, room, MAX_SHARED), full(HEADS, room, MAX_SHARED, dtype=torch.int64)
    counts = torch.zeros(HEADS, room, 2, dtype=torch.int32, device=device)
    for head, of_head in enumerate(lists):
        for place, entries in enumerate(of_head):
            count = len(entries)
            blocks[head, place, :count] = torch.tensor(list(entries), dtype=torch.int32)
            masks[head, place, :count] = torch.tensor(list(entries.values()), dtype=torch.int64)
            counts[head, place, 1] = count
    joined = (
        full(HEADS, room, 2 * MAX_SHARED),
        full(HEADS, room, 2, 2 * MAX_SHARED, dtype=torch.int64),
        full(HEADS, room, 2),
    )
    agreement = Agreement(blocks, masks, counts, full(HEADS, 0, 4), joined, None)
    starts = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, num_keys))
    join_lists(agreement, problem, tile, group, *starts)
    of_joint = joined[2]
    first_pair, asked = tiles_of(problem, 2 * TOKENS, group)
    for head, of_head in enumerate(lists):
        for number in range(asked):
            first = (first_pair + number) * 2
            if first * TOKENS >= tokens:
                assert of_joint[head, number].tolist() == [0, 0]
                continue
            first_of_pair, second = (
                of_head[place] if 0 <= (place := at - first_tile) < num_tiles else {}
                for at in (first, first + 1)
            )
            union = sorted({*first_of_pair, *second})
            seen = first * TOKENS + num_keys - tokens + 1
            whole = sum((block + 1) * BLOCK_SIZE <= seen for block in union)
            assert of_joint[head, number].tolist() == [whole, len(union)]
            assert joined[0][head, number, : len(union)].tolist() == union
            for half, entries in enumerate((first_of_pair, second)):
                held = joined[1][head, number, half, : len(union)].tolist()
                assert held == [entries.get(block, 0) for block in union]

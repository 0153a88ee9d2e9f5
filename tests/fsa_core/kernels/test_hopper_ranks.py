"""The kernel for Hopper that ranks pairs, against pairs that are counted: interpreted where it cannot run."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch

from fsa_core.kernels import hopper, hopper_ranks, sorted_index
from fsa_core.kernels.replay import Memory
from fsa_core.kernels.sorted_index import new_sorted_index, sort_pairs
from tests import gluon_interpreter
from tests.gluon_interpreter import interpreted

NUM_BLOCKS, NUM_SEGMENTS, TILE_PAIRS, STRIP_TILES = 320, 1000, 1024, 3


def different_blocks(num_tokens: int, num_slots: int, of: int) -> torch.Tensor:
    """Of as many blocks, the last ones, in any order; int32 [tokens, slots]."""
    draw = torch.rand(num_tokens, of, generator=torch.Generator().manual_seed(0))
    return draw.argsort(1)[:, :num_slots].int() + (NUM_BLOCKS - of)


def agreeing(num_tokens: int, num_slots: int) -> torch.Tensor:
    return different_blocks(num_tokens, num_slots, num_slots + 5)


def at_random(num_tokens: int, num_slots: int) -> torch.Tensor:
    return different_blocks(num_tokens, num_slots, NUM_BLOCKS)


def in_turn(num_tokens: int, num_slots: int) -> torch.Tensor:
    """Tiles that agree and tiles that do not."""
    is_random = torch.arange(num_tokens) * num_slots // TILE_PAIRS % 2 == 1
    both = at_random(num_tokens, num_slots), agreeing(num_tokens, num_slots)
    return torch.where(is_random[:, None], *both)


def twice(num_tokens: int, num_slots: int) -> torch.Tensor:
    """In the second tile some tokens have a block twice, and one has nothing else."""
    ids, first = agreeing(num_tokens, num_slots), TILE_PAIRS // num_slots
    ids[first + 3 : first + 30, 1] = ids[first + 3 : first + 30, 3]
    ids[first + 40] = ids[first + 40, 0].clone()
    return ids


def invalid(num_tokens: int, num_slots: int) -> torch.Tensor:
    """Some ids name no block, and of the second tile none does."""
    ids = agreeing(num_tokens, num_slots)
    for place, name in enumerate((-1, NUM_BLOCKS, -7, 2**31 - 1, -(2**31))):
        ids[torch.arange(num_tokens) % 7 == place, place % num_slots] = name
    ids[TILE_PAIRS // num_slots : 2 * TILE_PAIRS // num_slots] = -1
    return ids


def in_groups(num_tokens: int, num_slots: int) -> torch.Tensor:
    """A tile's tokens agree, but by fives: more blocks than are searched."""
    group = torch.arange(num_tokens)[:, None] % 5
    return (group * num_slots + torch.arange(num_slots)).int()


def scattered(num_tokens: int, num_slots: int) -> torch.Tensor:
    """Few blocks, of which a token has two: each is chosen by few."""
    ids = different_blocks(num_tokens, num_slots, 40)
    ids[:, 2:] = -1
    return ids


def check_ranks(ids: torch.Tensor, q_lens: tuple[int, ...], chunk_tokens: int, device: torch.device) -> None:
    """Of ids [heads, tokens, slots], in chunks, against pairs that are counted one by one."""
    num_heads, num_tokens, num_slots = ids.shape
    cu_q = [sum(q_lens[:i]) for i in range(len(q_lens) + 1)]
    cu_k = [16 * NUM_BLOCKS * sum(n > 0 for n in q_lens[:i]) for i in range(len(q_lens) + 1)]
    sequence_of = [sequence for sequence, n in enumerate(q_lens) for _ in range(n)]
    index = new_sorted_index(
        Memory(ids.to(device)), num_heads=num_heads, num_tokens=num_tokens, chunk_tokens=chunk_tokens,
        num_slots=num_slots, num_segments=NUM_SEGMENTS, max_items=chunk_tokens * num_slots,
    )  # fmt: skip
    sort_pairs(
        index, ids.to(device), torch.tensor(cu_q).int().to(device), torch.tensor(cu_k).int().to(device),
        first_token=0, num_tokens=num_tokens, chunk_tokens=chunk_tokens, first_head=0, head_step=1,
        block_size=16, pairs_per_item=5,
    )  # fmt: skip
    rows, offsets = iter(index.counts.tolist()), iter(index.offsets)
    for head, first in product(range(num_heads), range(0, num_tokens, chunk_tokens)):
        counts, ranks, before = [0] * NUM_SEGMENTS, [], []
        chunk = ids[head, first : first + chunk_tokens]
        for place, block in enumerate(chunk.flatten().tolist()):
            if place % (STRIP_TILES * TILE_PAIRS) == 0:
                before.append(list(counts))
            sequence = sequence_of[first + place // num_slots]
            segment = cu_k[sequence] // 16 + sequence + block
            exists = 0 <= block < NUM_BLOCKS
            ranks.append(counts[segment] - before[-1][segment] if exists else -1)
            if exists:
                counts[segment] += 1
        assert index.ranks[head, first : first + chunk_tokens].flatten().tolist() == ranks
        assert next(offsets).diff().tolist() == counts
        # A last chunk may have fewer strips than there is room for.
        assert next(rows)[: len(before)] == before


@pytest.fixture
def tiles_sorted(
    device: torch.device, replace_by: Callable, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[object] | None]:
    """Of tiles of 1,024 pairs, those whose blocks are not found one by one; None if the GPU alone knows."""
    monkeypatch.setattr(sorted_index, "PAIRS_IN_TILE", TILE_PAIRS)
    # So that strips are as short as they can be.
    monkeypatch.setattr(sorted_index, "STRIPS_AT_ONCE", 1000)
    if device.type == "cuda":
        if not hopper.runs_on(device):
            pytest.skip("Gluon's kernels for Hopper run on nothing else")
        yield None
        return
    tiles = list[object]()

    def sort(*args: object) -> None:
        tiles.append(args[0])
        gluon_interpreter._in_python(hopper_ranks._sort.fn)(*args)

    replace_by("_sort", sort)
    with interpreted() as launched:
        yield tiles
    assert launched == {"rank"}


@pytest.mark.parametrize(
    ("draw", "num_slots", "q_lens", "num_sorted"),
    [
        (agreeing, 16, (400,), 0),
        (agreeing, 4, (700,), 0),
        (agreeing, 32, (70,), 0),
        (agreeing, 12, (150,), 2),
        (agreeing, 1, (1100,), 2),
        (at_random, 16, (400,), 7),
        (at_random, 4, (500,), 2),
        (in_turn, 16, (400,), 3),
        (twice, 16, (150,), 1),
        (invalid, 16, (200,), 0),
        (invalid, 12, (200,), 3),
        (in_groups, 16, (100,), 2),
        (scattered, 16, (100,), 2),
        # The second tile has tokens of three sequences.
        (agreeing, 16, (90, 0, 15, 75), 0),
        (at_random, 4, (290, 0, 130, 60), 2),
        (agreeing, 12, (90, 0, 15, 75), 3),
    ],
)
def test_ranks(
    device: torch.device,
    tiles_sorted: list[object] | None,
    draw: Callable[[int, int], torch.Tensor],
    num_slots: int,
    q_lens: tuple[int, ...],
    num_sorted: int,
) -> None:
    num_tokens = sum(q_lens)
    check_ranks(draw(num_tokens, num_slots)[None], q_lens, num_tokens, device)
    assert tiles_sorted is None or len(tiles_sorted) == num_sorted


@pytest.mark.usefixtures("tiles_sorted")
def test_ranks_of_heads_and_chunks(device: torch.device) -> None:
    draws = (agreeing, at_random, twice)
    check_ranks(torch.stack([draw(450, 16) for draw in draws]), (450,), 200, device)

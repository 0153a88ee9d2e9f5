"""The selections that a benchmark sends are ones that the service takes, and are like a model's."""

import numpy as np
import pytest

from service.bench.workload import Shape, make_request, select_blocks
from service.client import BlockIndices, Dense


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("tokens", [1, 16, 17, 500])
def test_a_row_has_its_own_block_the_first_and_distinct_visible_ones(tokens: int, slots: int) -> None:
    shape = Shape(tokens, 4, 2, 16, block_size=16, slots=slots, dtype="float32")
    indices = select_blocks(shape, np.random.default_rng(0))
    assert indices.shape == (2, tokens, slots)
    assert indices.dtype == np.int32
    for row, token in ((row, token) for head in indices for token, row in enumerate(head)):
        own = token // 16
        chosen = row[row >= 0]
        assert (np.diff(chosen) > 0).all(), "unique and ascending"
        assert (row[len(chosen) :] == -1).all(), "unused slots come last"
        assert chosen[-1] == own
        assert slots == 1 or chosen[0] == 0
        assert len(chosen) >= min(slots, 2, own + 1)


def test_rows_are_full_once_there_are_blocks_enough_and_differ_between_heads_and_seeds() -> None:
    shape = Shape(512, 4, 2, 16, block_size=16, slots=8, dtype="bfloat16")
    first, second = (make_request(shape, seed).pattern for seed in (0, 1))
    assert isinstance(first, BlockIndices)
    assert isinstance(second, BlockIndices)
    assert (first.indices[:, 16 * 8 :] >= 0).all()
    assert (first.indices[0] != first.indices[1]).any()
    assert (first.indices != second.indices).any()


def test_no_slots_is_dense_attention() -> None:
    shape = Shape(4, 2, 1, 16, block_size=16, slots=0, dtype="float16")
    request = make_request(shape, 0)
    assert isinstance(request.pattern, Dense)
    assert request.q.dtype == np.float16
    moved = 2 * (request.q.nbytes + request.k.nbytes)
    assert shape.tensor_bytes == moved

"""Recorded choices of blocks, and the cases that they can stand in for."""

import numpy as np

from benchmarks.cases import as_recorded, suite
from benchmarks.indices import recorded_block_indices

SLOTS = 16


def test_recorded_indices_take_their_heads_from_all_layers(tmp_path) -> None:
    layers = {f"layer{i}": np.full((3, 128, SLOTS), i, np.int16) for i in range(2)}
    np.savez(tmp_path / "recorded.npz", **layers)
    recorded = recorded_block_indices(tmp_path / "recorded.npz")
    assert recorded.shape == (6, 128, SLOTS)
    assert recorded[:, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_recorded_cases_are_the_real_ones_that_the_file_is_long_enough_for() -> None:
    cases = as_recorded(suite("targets"), 8192, SLOTS)
    assert {(case.num_tokens, case.block_size, case.kind) for case in cases} == {(8192, 64, "recorded")}
    assert {case.group_size for case in cases} == {1, 2, 4, 8, 16}

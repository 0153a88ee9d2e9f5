"""The drawn block choices obey the contract and agree between neighbours as much as they say they do."""

import numpy as np
import pytest
import torch

from benchmarks import indices
from benchmarks.cases import as_recorded, suite
from benchmarks.indices import causal_block_indices, recorded_block_indices
from fsa_core.index_checks import IndexRows, ids_are_valid

TOKENS, HEADS, SLOTS, BLOCK = 8192, 3, 16, 64


def draw(kind: indices.Kind, num_tokens: int = TOKENS) -> torch.Tensor:
    return causal_block_indices(num_tokens, HEADS, SLOTS, BLOCK, kind, torch.Generator().manual_seed(0))


def chosen_blocks(ids: torch.Tensor) -> torch.Tensor:
    """bool [heads, tokens 4K to 8K, blocks]"""
    num_blocks = TOKENS // BLOCK
    chosen = torch.zeros(HEADS, TOKENS, num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, ids.long().where(ids >= 0, num_blocks), True)
    return chosen[:, TOKENS // 2 :, :num_blocks]


def union_size(ids: torch.Tensor, tile: int) -> float:
    """Blocks that ``tile`` neighbouring tokens choose between them, the mean."""
    return chosen_blocks(ids).unflatten(1, (-1, tile)).any(2).sum(-1).double().mean().item()


# The layers of SmolLM2 on real text lie between these: unions of 8, 32 and 64 tokens.
@pytest.mark.parametrize(("tile", "least", "most"), [(8, 19, 28), (32, 22, 41), (64, 25, 49)])
def test_real_indices_agree_as_a_models_do_and_random_ones_do_not(tile: int, least: int, most: int) -> None:
    assert least <= union_size(draw("real"), tile) <= most
    assert union_size(draw("random"), tile) > 1.5 * most


def test_the_share_of_pairs_on_blocks_that_most_of_a_tile_choose_is_a_models() -> None:
    choosers = chosen_blocks(draw("real")).unflatten(1, (-1, 32)).sum(2)
    share = choosers[choosers > 16].sum() / choosers.sum()
    assert 0.73 <= share <= 0.94


@pytest.mark.parametrize("kind", ["random", "real", "same"])
@pytest.mark.parametrize("scores_at_once", [1 << 28, 5000])
def test_drawn_indices_obey_the_contract_however_they_are_cut_into_pieces(
    kind: indices.Kind, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indices, "SCORES_AT_ONCE", scores_at_once)
    ids = draw(kind, 1500)
    starts = torch.tensor([0, 1500], dtype=torch.int32)
    rows = IndexRows.of(starts, starts, 1500, block_size=BLOCK, query_block_size=1, causal=True)
    assert ids.shape == (HEADS, 1500, SLOTS)
    assert ids_are_valid(ids, rows)
    expected = (
        1 if kind == "same" else torch.arange(1500).div(BLOCK, rounding_mode="floor").add(1).clamp(max=SLOTS)
    )
    assert torch.equal((ids >= 0).sum(-1), torch.as_tensor(expected).expand(HEADS, 1500))


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

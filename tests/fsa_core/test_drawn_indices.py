"""The drawn block choices obey the contract and agree between neighbours as much as they say they do."""

import pytest
import torch

from fsa_core import drawn_indices
from fsa_core.drawn_indices import DrawnKind, causal_block_indices
from fsa_core.index_checks import IndexRows, ids_are_valid

TOKENS, HEADS, SLOTS, BLOCK = 8192, 3, 16, 64


def draw(kind: DrawnKind, num_tokens: int = TOKENS) -> torch.Tensor:
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
    kind: DrawnKind, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_indices, "SCORES_AT_ONCE", scores_at_once)
    ids = draw(kind, 1500)
    starts = torch.tensor([0, 1500], dtype=torch.int32)
    rows = IndexRows.of(starts, starts, 1500, block_size=BLOCK, query_block_size=1, causal=True)
    assert ids.shape == (HEADS, 1500, SLOTS)
    assert ids_are_valid(ids, rows, torch.tensor(True))
    expected = (
        1 if kind == "same" else torch.arange(1500).div(BLOCK, rounding_mode="floor").add(1).clamp(max=SLOTS)
    )
    assert torch.equal((ids >= 0).sum(-1), torch.as_tensor(expected).expand(HEADS, 1500))

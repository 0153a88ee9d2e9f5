"""The inversion that is timed alone is the whole of it, and its gate lets no wrong place pass."""

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gate import sampled_truth, worst_error
from benchmarks.inputs import make_inputs
from benchmarks.inversion import prepare_inversion, segments_of_pairs
from fsa_core.kernels import hopper


@pytest.mark.parametrize("with_records", [False, True])
def test_every_token_and_slot_is_found_under_its_block(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, with_records: bool
) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda _device: with_records)
    monkeypatch.setattr(hopper, "MIN_FORWARD_BYTES", 0)
    sizes = {"num_kv_heads": 2, "num_slots": 4, "head_dim": 64, "block_size": 64}
    x = make_inputs(Case(300, 2, "real", "index", **sizes), device)
    answer = prepare_inversion(x, "index")()
    truth = sampled_truth(x, "index")
    assert worst_error(segments_of_pairs(answer), truth) == 0.0
    pairs = answer[0]
    pairs[0, :2] = pairs[0, :2].flip(0) + 1
    assert worst_error(segments_of_pairs(answer), truth) > 0.0

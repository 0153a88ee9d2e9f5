"""The grid that compute-sanitizer runs over is right itself, and says so when an answer is not."""

import sys

import pytest
import torch

from fsa_core.plan import MIXED
from tests import sanitizer_grid


def test_ids_that_nobody_validated_give_right_answers_and_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer_grid, "SHAPES", sanitizer_grid.SHAPES[:1])
    monkeypatch.setattr(sanitizer_grid, "SELECTIONS", ("wild",))
    # It has the kernels of the others.
    monkeypatch.setattr(sanitizer_grid, "PATHS", (MIXED,))
    for _, case, ids, options in sanitizer_grid.grid(device):
        assert (ids < -1).any()
        sanitizer_grid.check(case, ids, device, **options)


def test_a_wrong_answer_gives_a_bad_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(problem, q, k, v, *rest, **options):
        out = (q.sum() + k.sum() + v.sum()) * torch.zeros_like(v[:1, :1]).expand(
            problem.num_q_tokens, problem.num_q_heads, -1
        )
        return out, out[..., 0].float()

    monkeypatch.setattr(sanitizer_grid, "attend", zeros)
    monkeypatch.setattr(sanitizer_grid, "SHAPES", sanitizer_grid.SHAPES[:1])
    monkeypatch.setattr(sanitizer_grid, "SELECTIONS", ("random",))
    monkeypatch.setattr(sys, "argv", ["sanitizer_grid", "--device", "cpu"])
    assert sanitizer_grid.main() == 1
    assert "lse is -inf exactly where" in capsys.readouterr().out

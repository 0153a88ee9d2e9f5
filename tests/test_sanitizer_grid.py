"""The grid that compute-sanitizer runs over is right itself, and says so when an answer is not."""

import sys

import pytest
import torch

from fsa_core.kernels import hopper
from fsa_core.plan import MIXED
from tests import sanitizer_grid
from tests.gluon_interpreter import interpreted


def test_ids_that_nobody_validated_give_right_answers_and_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer_grid, "SHAPES", sanitizer_grid.SHAPES[:1])
    monkeypatch.setattr(sanitizer_grid, "SELECTIONS", ("wild",))
    # It has the kernels of the others.
    monkeypatch.setattr(sanitizer_grid, "PATHS", (MIXED,))
    for _, case, ids, options in sanitizer_grid.selections(device):
        assert (ids < -1).any()
        sanitizer_grid.check_selected(case, ids, device, **options)


@pytest.mark.parametrize("stage", ["compressed", "window", "selection", "decode", "gates", "means"])
def test_the_stages_of_the_operator_are_right(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(sanitizer_grid, "SHAPES", ())
    monkeypatch.setattr(sanitizer_grid, "OPERATOR_SHAPES", sanitizer_grid.OPERATOR_SHAPES[:1])
    checks = [check for name, check in sanitizer_grid.grid(device) if name.startswith(stage)]
    checks[0]()


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("selected g=2 D=64 float16 random kv_major", {"attend_pairs", "of_pairs", "rank"}),
        (
            "selected g=16 D=128 float16 random mixed",
            {"agree", "attend", "attend_pairs", "gradients", "of_tiles", "rank"},
        ),
        ("compressed g=16 D=128 float16", {"attend_windows", "of_queries", "of_windows"}),
        ("selection g=3 D=128 float16, many tokens", {"select"}),
    ],
)
def test_kernels_for_hopper_are_in_it(device: torch.device, name: str, kernels: set[str]) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU's own kernels run on it")
    with interpreted() as launched:
        dict(sanitizer_grid.grid(device))[name]()
    assert launched == kernels


def test_twins_are_checked_without_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU's own kernels run on it")
    name = "compressed g=16 D=128 float16"
    monkeypatch.setattr(sys, "argv", ["sanitizer_grid", "--device", "cpu", "--twins", "--only", name])
    with interpreted() as launched:
        assert sanitizer_grid.main() == 0
    assert not launched


def test_a_wrong_answer_gives_a_bad_exit_code(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(problem, q, k, v, *rest, **options):
        out = (q.sum() + k.sum() + v.sum()) * torch.zeros_like(v[:1, :1]).expand(
            problem.num_q_tokens, problem.num_q_heads, -1
        )
        return out, out[..., 0].float()

    # What the grid changes is put back when the test ends.
    monkeypatch.setattr(hopper, "MIN_FORWARD_BYTES", 0)
    monkeypatch.setattr(hopper, "MIN_GRADIENT_BYTES", 0)
    monkeypatch.setattr(sanitizer_grid, "attend", zeros)
    monkeypatch.setattr(sanitizer_grid, "SHAPES", sanitizer_grid.SHAPES[:1])
    monkeypatch.setattr(sanitizer_grid, "SELECTIONS", ("random",))
    monkeypatch.setattr(sys, "argv", ["sanitizer_grid", "--device", str(device), "--only", "selected"])
    assert sanitizer_grid.main() == 1
    assert "lse is -inf exactly where" in capsys.readouterr().out

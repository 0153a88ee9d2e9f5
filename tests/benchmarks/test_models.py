"""Layers with their attention swapped, as small as they can be."""

from pathlib import Path

import pytest
import torch

from benchmarks import models, models_report
from benchmarks.model_cores import cores_of, worst_error
from benchmarks.model_layer import Stack, rotation_of
from benchmarks.models_results import ModelResults, ModelRow, mean_times_faster
from benchmarks.results_file import Measured

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def operands() -> tuple[torch.Tensor, ...]:
    stack = Stack(models.TINY, 1, CPU, torch.float32)
    x = torch.randn(models.TINY_TOKENS, models.TINY.hidden_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return stack.layers[0].operands(x, rotation_of(models.TINY, len(x), x))


@pytest.mark.parametrize("name", ["ours", "dense causal"])
def test_the_gate_tells_sparse_from_dense(operands, name: str) -> None:
    out = cores_of(models.TINY_CONFIG, CPU, None)[name](*operands)
    is_dense = name.startswith("dense")
    assert worst_error(out, operands, models.TINY_CONFIG, dense=is_dense) < 1e-4
    assert not worst_error(out, operands, models.TINY_CONFIG, dense=not is_dense) < models.TOLERANCE


def test_the_rotation_keeps_what_depends_on_distance_alone() -> None:
    shape = models.TINY
    stack = Stack(shape, 1, CPU, torch.float64)
    x = torch.randn(1, shape.hidden_dim, dtype=torch.float64).expand(12, -1)
    q, k, _, _ = stack.layers[0].operands(x, rotation_of(shape, 12, x))
    scores = q[:, 0] @ k[:, 0].T
    torch.testing.assert_close(scores[5, 2], scores[11, 8])
    assert not torch.allclose(scores[5, 2], scores[11, 2])


def test_a_tiny_model_is_measured_written_and_drawn(tmp_path: Path, capsys) -> None:
    path = tmp_path / "models.json"
    assert models.main(["--tiny", "--json", str(path), "--seconds", "0.01"]) == 0
    results = ModelResults.read(path)
    assert [row.phase for row in results.rows] == ["training", "prefill"]
    for row in results.rows:
        assert {name: m.refused for name, m in row.contenders.items()} == {"ours": None, "dense causal": None}
        assert row.layer_seconds("ours") > 0
    models_report.print_table(results)
    assert "training" in capsys.readouterr().out
    assert [p.name for p in models_report.draw(results, path)] == [
        "models_training.svg",
        "models_prefill.svg",
    ]


def test_what_fails_is_written_down_and_the_others_are_measured() -> None:
    def out_of_memory(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("too large")

    cores = cores_of(models.TINY_CONFIG, CPU, None) | {
        "nsa": out_of_memory,
        "fsa": lambda q, k, v, gates: q,
    }
    row = next(models.measure_model(models.TINY, [64], 1, cores, models.TINY_CONFIG, CPU, 0.01))
    assert "too large" in row.contenders["nsa"].refused
    assert row.contenders["fsa"].refused.startswith("wrong by")
    assert row.layer_seconds("ours") > 0
    assert row.times_faster("ours") is None


def test_a_wrong_answer_of_ours_is_not_timed_and_is_the_exit_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(models, "TOLERANCE", 0.0)
    path = tmp_path / "models.json"
    assert models.main(["--tiny", "--json", str(path)]) == 1
    assert [row.layer_seconds("ours") for row in ModelResults.read(path).rows] == [None, None]


def test_ratios_are_combined_by_their_geometric_mean() -> None:
    def row(nsa: float, ours: float) -> ModelRow:
        contenders = {"ours": Measured(median_seconds=ours), "nsa": Measured(median_seconds=nsa)}
        return ModelRow("m", 64, 2, "prefill", contenders)

    rows = [row(2.0, 1.0), row(8.0, 1.0)]
    assert mean_times_faster(rows, "prefill", "ours") == pytest.approx(4.0)
    assert mean_times_faster(rows, "training", "ours") is None

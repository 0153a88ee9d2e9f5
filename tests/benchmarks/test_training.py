"""Training a model of bytes, sparse and dense, as small as it can be."""

from pathlib import Path

import pytest
import torch

from benchmarks import training_report
from benchmarks.corpus import standard_library, windows
from benchmarks.training import Options, train_both
from benchmarks.training_model import ATTENTION, ByteModel, ModelConfig
from benchmarks.training_results import TrainingResults
from fsa_core.nsa.config import NSAConfig

NSA = NSAConfig(kernel_size=8, stride=4, block_size=16, top_k=3, num_local_blocks=1, window=16)
CONFIG = ModelConfig(num_layers=2, hidden_dim=32, mlp_dim=64, num_q_heads=2, num_kv_heads=1, nsa=NSA)
OPTIONS = Options(steps=20, sequences=2, length=96, validate_every=10, learning_rate=1e-2, warm_up_steps=4)


@pytest.fixture(scope="module")
def corpus():
    return standard_library()


def test_the_corpus_is_sources_and_holds_files_out(corpus) -> None:
    training, held_out = (bytes(part.numpy().tobytes()) for part in (corpus.training, corpus.held_out))
    assert b"import sys" in training
    assert 0.01 < len(held_out) / len(training) < 0.3
    files = held_out.split(b"\0")[:-1]
    assert not any(len(file) > 200 and file in training for file in files)


def test_windows_are_the_bytes_from_their_starts() -> None:
    text = torch.arange(20, dtype=torch.uint8)
    assert windows(text, torch.tensor([3, 0]), 4).tolist() == [[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("attention", list(ATTENTION))
def test_every_parameter_has_a_gradient_and_no_byte_sees_those_after_it(corpus, attention: str) -> None:
    torch.manual_seed(0)
    model = ByteModel(attention, CONFIG)
    batch = windows(corpus.training, torch.tensor([0, 5000]), 96)
    model.loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    given, changed = batch[:, :-1], batch[:, :-1].clone()
    changed[1, 40:] = 7
    before, after = (model.logits(x).unflatten(0, (2, 96)) for x in (given, changed))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1, :40], before[1, :40])
    assert not torch.allclose(after[1, 40:], before[1, 40:])


def test_both_learn_and_what_they_did_can_be_read_and_drawn(corpus, tmp_path: Path, capsys) -> None:
    path = tmp_path / "training.json"
    fields = {"machine": {}, "command": "", "corpus": {}, "model": {}}
    results = TrainingResults(
        **fields, options={"steps": OPTIONS.steps, "sequences": OPTIONS.sequences, "length": OPTIONS.length}
    )
    train_both(results, corpus, CONFIG, OPTIONS, torch.device("cpu"), path)
    assert list(results.runs) == ["sparse", "dense"]
    for run in results.runs.values():
        assert [step for step, _ in run.training] == [step for step, _ in run.validation] == [10, 20]
        assert run.validation[1][1] < run.validation[0][1] < 5.0
    assert TrainingResults.read(path) == results
    assert 0.8 < results.final_ratio < 1.25
    training_report.print_table(results)
    assert "sparse / dense" in capsys.readouterr().out
    (plot,) = training_report.draw(results, path)
    assert plot.read_text().startswith("<?xml")

"""The operator's parts in the runner, and that their gate notices wrong choices, answers and gradients."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `bench`")

from benchmarks import run
from benchmarks.cases import Case, suite
from benchmarks.contenders import OUR_TOLERANCE
from benchmarks.inputs import make_inputs
from benchmarks.operator_contenders import operator_contenders
from benchmarks.operator_gate import operator_error
from benchmarks.results_file import Results

PARTS = [case for case in suite("smoke") if case.part != "selected"]
CPU = torch.device("cpu")


def test_every_part_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    words = f"--suite smoke --only g2-*-h2 --device cpu --threads 1 --seconds 0.001 --json {path}"
    assert run.main(words.split()) == 0
    rows = Results.read(path).rows
    assert [row.case for row in rows] == PARTS
    for row in rows:
        dense = {"dense causal"} if row.case.part in ("operator", "windowed") else set()
        assert set(row.contenders) == {"ours", *dense}
        assert all(measured.median_seconds > 0 for measured in row.contenders.values())


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.name)
def test_the_gate_passes_ours_and_no_tensor_that_is_off(case: Case) -> None:
    x = make_inputs(case, CPU)
    answer = operator_contenders(case, with_peers=False)[0].prepare(x, case.stage)()
    assert operator_error(case, x, answer) < 1e-3
    for number in range(len(answer) - 1):
        wrong = [t.clone() for t in answer]
        wrong[number][-1] += 0.5
        assert operator_error(case, x, tuple(wrong)) > OUR_TOLERANCE


@pytest.mark.parametrize("slot", [0, -2, -1])
def test_the_gate_notices_a_block_that_was_not_chosen(slot: int) -> None:
    case = PARTS[0]
    x = make_inputs(case, CPU)
    out, ids = operator_contenders(case, with_peers=False)[0].prepare(x, "forward")()
    ids[:, -1, slot] = -1
    assert operator_error(case, x, (out, ids)) > OUR_TOLERANCE

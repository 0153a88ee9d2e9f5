"""The runner, end to end on the CPU backend: results, goals, plots, and no time for a wrong answer."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `bench`")

from benchmarks import contenders, report, run
from benchmarks.cases import SUITES, suite
from benchmarks.plots import draw
from benchmarks.results_file import Results

COMMITTED = Path(run.__file__).parent / "results"
CASE = "forward-real-n384-g2-h2-d32v16-16x4"


def run_smoke(folder: Path, only: str) -> tuple[int, Path]:
    path = folder / "results.json"
    words = f"--suite smoke --only {only} --device cpu --threads 1 --seconds 0.005 --json {path}"
    return run.main(words.split()), path


def test_a_run_writes_times_machine_and_work_that_the_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = run_smoke(tmp_path, CASE)
    assert code == 0
    assert CASE in capsys.readouterr().out
    results = Results.read(path)
    assert results.machine["torch"] == torch.__version__
    assert results.ceilings.flops_per_second > 0
    (row,) = results.rows
    assert row.case.name == CASE
    assert row.work.flops == 2 * row.work.pairs * (32 + 16)
    assert set(row.contenders) == {"ours", "dense masked", "dense causal"}
    assert all(measured.median_seconds > 0 and measured.runs >= 4 for measured in row.contenders.values())
    (plot,) = draw(results, path)
    assert plot.name == "results_roofline.svg"
    assert "measured in the same run" in plot.read_text()


def test_rows_that_queries_share_are_timed_beside_attention_of_as_many_keys(tmp_path: Path) -> None:
    code, path = run_smoke(tmp_path, "q32")
    assert code == 0
    rows = Results.read(path).rows
    assert [row.case.stage for row in rows] == ["forward", "backward"]
    assert all(row.seconds("torch at as many keys") > 0 for row in rows)


def test_a_wrong_answer_gets_no_time_for_anybody_and_a_bad_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contenders.selected_attention

    def forgets_a_slot(q, k, v, ids, **options):
        return right(q, k, v, ids.index_fill(2, torch.tensor([1]), -1), **options)

    monkeypatch.setattr(contenders, "selected_attention", forgets_a_slot)
    code, path = run_smoke(tmp_path, "random")
    assert code == 1
    said = capsys.readouterr()
    assert "RED" in said.out
    assert " ms" not in said.out
    assert "wrong answers, not measured" in said.err
    rows = Results.read(path).rows
    assert [row.case.stage for row in rows] == ["forward", "backward"] * 2
    assert all(row.red.startswith("wrong by") and not row.contenders for row in rows)


def test_a_wrong_or_failing_rival_loses_its_own_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(x, stage):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(contenders, "prepare_dense_masked", failing)
    monkeypatch.setattr(
        contenders, "prepare_dense_causal", lambda x, stage: lambda: (torch.zeros_like(x.grad_out),)
    )
    code, path = run_smoke(tmp_path, CASE)
    assert code == 0
    (row,) = Results.read(path).rows
    assert row.seconds("ours") > 0
    assert row.contenders["dense masked"].refused == "failed: RuntimeError: no such kernel"
    assert row.contenders["dense causal"].refused.startswith("wrong by")
    assert row.seconds("dense masked") is None


@pytest.mark.parametrize(
    ("name", "goal", "plot", "contenders"),
    [
        ("h200", "fastest peer / ours", "latency_forward", ("ours", "fsa", "nsa", "sfnsa", "dense cuDNN")),
        ("cpu", "time of an attended key, ours / dense causal", "roofline", ("ours",)),
    ],
)
def test_the_report_of_committed_results_prints_goals_and_draws_plots(
    name: str,
    goal: str,
    plot: str,
    contenders: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    committed = COMMITTED / f"selected_attention_{name}.json"
    copy = tmp_path / committed.name
    copy.write_text(committed.read_text())
    monkeypatch.setattr(sys, "argv", ["report", str(copy)])
    report.main()
    assert goal in capsys.readouterr().out
    drawn = (tmp_path / f"{committed.stem}_{plot}.svg").read_text()
    for contender in contenders:
        assert contender in drawn


def test_a_run_goes_on_where_an_earlier_one_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = run_smoke(tmp_path, "forward-real")
    before = Results.read(path).rows
    capsys.readouterr()
    run_smoke(tmp_path, "real --resume")
    assert "forward" not in capsys.readouterr().out
    assert Results.read(path).rows[0] == before[0]
    assert [row.case.stage for row in Results.read(path).rows] == ["forward", "backward"]
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(SystemExit, match="another machine or version"):
        run_smoke(tmp_path, "real --resume")


def test_a_pattern_that_matches_nothing_is_wrong_usage_and_names_the_cases(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--suite", "smoke", "--only", "n8192", "--device", "cpu"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("benchmarks: no case of smoke matches 'n8192'; there are\n")
    assert CASE in said.err


@pytest.mark.parametrize(("file", "why"), [("absent/x.json", "No such file"), ("", "Is a directory")])
def test_results_that_could_not_be_written_are_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, why: str
) -> None:
    path = tmp_path / file
    with pytest.raises(SystemExit) as ended:
        run.main(["--suite", "smoke", "--only", CASE, "--device", "cpu", "--json", str(path)])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"benchmarks: --json {path} cannot be written: {why}")
    assert said.err.count("\n") == 1


def test_suites_that_time_a_gpu_say_so_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("host", "index"):
        with pytest.raises(SystemExit, match="2"):
            run.main(["--suite", name, "--device", "cpu"])
        assert f"the suite {name} needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUITES)
def test_cases_of_a_suite_have_names_of_their_own(name: str) -> None:
    names = [case.name for case in suite(name)]
    assert len(set(names)) == len(names)

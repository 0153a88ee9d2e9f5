"""``fsa tune``: a table that is complete at any time, added to, and never mixed with foreign numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsa_core.plan import KV_MAJOR, PATHS, TOKEN_MAJOR
from fsa_core.problem import Problem
from fsa_core.tiles import PartialTuning, SharedTuning, Tuning
from fsa_core.tuning import GRID, Grid
from fsa_core.tuning_table import Entry, Shape, Table, read_table
from service.commands.failures import CommandFailed
from service.commands.shapes import CallShape
from service.commands.tune import SHAPES, fill, new_table

GROUP_OF_1, GROUP_OF_2 = (
    CallShape(q_heads=heads, kv_heads=1, head_dim=16, block_size=16, slots=2, dtype="float16").problem(20)
    for heads in (1, 2)
)
SMALL = Grid(partial=(PartialTuning(32, 2, 4, 128),), shared=(SharedTuning(32, 4, 255, 1, 4),), shared_by=())


@pytest.fixture
def table() -> Table:
    return new_table("Test GPU", "20")


@pytest.fixture
def tune(tmp_path: Path, device: torch.device) -> Callable[..., Table]:
    """Runs the real kernels on tiny problems, by a clock on which each run is faster than the one before."""
    destination = tmp_path / "new" / "table.json"

    def run(table: Table, *problems: Problem, grid: Grid = SMALL) -> Table:
        seconds = iter(range(1000, 0, -1))

        def timer(run: Callable[[], object], count: int) -> list[float]:
            return [float(next(seconds))]

        fill(destination, table, [[problem] for problem in problems], device, timer, grid)
        return read_table(destination)

    return run


def test_a_table_has_an_entry_for_each_shape_and_says_how_it_was_measured(
    tune: Callable[..., Table], table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tune(table, GROUP_OF_1)
    (entry,) = written.entries
    assert (written.device, entry.shape) == ("test-gpu", Shape.of(GROUP_OF_1))
    assert entry.path == "mixed"
    assert set(entry.seconds) == set(PATHS) - {TOKEN_MAJOR}
    assert (entry.tuning.partial, entry.tuning.shared) == (SMALL.partial[0], SMALL.shared[0])
    assert written.provenance["torch"] == torch.__version__
    assert written.provenance["device_name"] == "Test GPU"
    assert capsys.readouterr().out.startswith("g=1 D=16 16-bit up to 16 blocks of 16: mixed (kv_major ")


def test_another_run_adds_shapes_and_replaces_those_it_measured_again(
    tune: Callable[..., Table], table: Table
) -> None:
    narrow = replace(SMALL, shared=())
    wider = replace(narrow, partial=(replace(SMALL.partial[0], rows=64),))
    (kept,) = tune(table, GROUP_OF_1, grid=narrow).entries
    shapes = [entry.shape for entry in tune(table, GROUP_OF_2, grid=narrow).entries]
    assert shapes == [kept.shape, Shape.of(GROUP_OF_2)]
    again = {entry.shape: entry for entry in tune(table, GROUP_OF_2, grid=wider).entries}
    assert again[kept.shape] == kept
    assert again[Shape.of(GROUP_OF_2)].tuning.partial.rows == 64


@pytest.mark.parametrize("name", ["device_name", "torch", "triton", "workload"])
def test_a_table_measured_with_something_else_is_left_as_it_is(
    tune: Callable[..., Table], table: Table, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "new" / "table.json"
    file.parent.mkdir()
    file.write_text(replace(table, provenance={**table.provenance, name: "another"}).to_json())
    before = file.read_text()
    with pytest.raises(CommandFailed, match=f"measured with another {name}"):
        tune(table, GROUP_OF_1)
    assert file.read_text() == before


@pytest.mark.parametrize("destination", ["file/table.json", "folder"])
def test_a_table_that_cannot_be_written_is_said_before_anything_is_measured(
    table: Table, tmp_path: Path, device: torch.device, destination: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    def timer(run: Callable[[], object], count: int) -> list[float]:
        raise AssertionError("measured")

    with pytest.raises(CommandFailed, match=r"cannot be written: (File exists|Is a directory)"):
        fill(tmp_path / destination, table, [[GROUP_OF_1]], device, timer, SMALL)


def test_a_run_that_fails_leaves_the_folder_and_no_table(
    tune: Callable[..., Table], table: Table, tmp_path: Path
) -> None:
    with pytest.raises(CommandFailed, match="no sizes of path"):
        tune(table, GROUP_OF_1, grid=replace(SMALL, partial=(replace(SMALL.partial[0], rows=48),)))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_shape_for_which_nothing_runs_fails_with_the_reason(
    tune: Callable[..., Table], table: Table
) -> None:
    with pytest.raises(CommandFailed, match=r"no sizes of path kv_major run .* power of"):
        tune(table, GROUP_OF_1, grid=replace(SMALL, partial=(replace(SMALL.partial[0], rows=48),)))


def test_the_default_shapes_are_sound_and_different() -> None:
    shapes = {Shape.of(shape.problem(8192)) for shape in SHAPES}
    assert len(shapes) == len(SHAPES) == 20
    assert {shape.heads_per_pair for shape in shapes} == {1, 2, 4, 8, 16}


def test_every_size_of_the_grid_may_stand_in_a_table(table: Table, tmp_path: Path) -> None:

    shape = Shape.of(GROUP_OF_1)
    for number, (partial, shared) in enumerate((p, s) for p in GRID.partial for s in GRID.shared):
        file = tmp_path / f"{number}.json"
        entry = Entry(shape, KV_MAJOR, Tuning(partial, shared))
        file.write_text(replace(table, entries=(entry,)).to_json())
        assert read_table(file).entries == (entry,)

"""``fsa tune``: measure on this GPU which kernels suit which shapes."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.failures import CommandFailed
from service.commands.output import format_seconds, writing
from service.commands.shapes import SHAPE_METAVAR, CallShape, Tokens, parse_tokens
from service.files import check_writable, write_file

if TYPE_CHECKING:
    import torch

    from fsa_core.problem import Problem
    from fsa_core.timing import Timer
    from fsa_core.tuning import Candidate, Grid
    from fsa_core.tuning_table import Entry, Table

SHAPES = tuple(
    CallShape(q_heads=4 * group_size, kv_heads=4, head_dim=head_dim, block_size=block_size, slots=slots)
    for head_dim, (block_size, slots), group_size in product(
        (64, 128), ((64, 16), (128, 8)), (1, 2, 4, 8, 16)
    )
)
# Two tables with entries of both cannot be told apart from one.
_SAME_IN_A_TABLE = ("device_name", "workload", "torch", "triton")


def tune(
    shape: Annotated[
        list[str] | None, typer.Option(metavar=SHAPE_METAVAR, help="Measure this one; may be repeated.")
    ] = None,
    tokens: Tokens = "8192,65536",
    output: Annotated[Path | None, typer.Option(help="Table to write; if not given, the user's own.")] = None,
) -> None:
    """Measure the paths and tile sizes of the kernels on this GPU, and write a table to choose them by.

    For each shape (if none is given: 4 KV heads of 64 and 128, 1 to 16 query heads each, 16 blocks of 64 and
    8 of 128), what has the least geometric mean of times wins, over the lengths and over random and realistic
    choices of blocks. What answers wrongly wins nothing. The table is written after every shape; one that is
    there keeps its other shapes, if it is of this GPU and of the same versions.
    """
    shapes = [CallShape.parse(text) for text in shape] if shape else SHAPES
    lengths = parse_tokens(tokens)
    import torch

    from fsa_core.timing import cuda_timer
    from fsa_core.tuning import GRID
    from fsa_core.tuning_table import TuningError, user_table_path

    calls = [[one.problem(length) for length in lengths] for one in shapes]
    if not torch.cuda.is_available():
        raise CommandFailed("fsa tune measures on a GPU, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    device_name = torch.cuda.get_device_name(device)
    try:
        destination = output or user_table_path(device_name)
    except TuningError as error:
        raise CommandFailed(f"{error}, or give --output") from error
    fill(destination, new_table(device_name, tokens), calls, device, cuda_timer, GRID)
    print(f"written to {destination}")


def new_table(device_name: str, tokens: str) -> "Table":
    """No entries yet; what they will have been measured with."""
    import torch

    from fsa_core.tuning_table import Table, family
    from service.info import build_versions

    versions = build_versions()
    provenance = {
        "device_name": device_name,
        "workload": f"one causal sequence of {tokens} tokens, random and real choices of blocks",
        "fsa_serve": versions["version"],
        "torch": versions["torch"],
        "triton": versions["triton"],
        "cuda": torch.version.cuda or "",
        "date": datetime.now(UTC).date().isoformat(),
    }
    return Table(family(device_name), (), provenance)


def fill(
    destination: Path,
    table: "Table",
    calls: Sequence[Sequence["Problem"]],
    device: "torch.device",
    timer: "Timer",
    grid: "Grid",
) -> None:
    """Measures shapes, each given as its problems of several lengths; adds their entries to a table's file.

    Raises CommandFailed.
    """
    with writing(destination):
        # Said now, and not after minutes of measuring.
        destination.parent.mkdir(parents=True, exist_ok=True)
        check_writable(destination)
    table = _with_entries_of(destination, table)
    reports = []
    with _progress(sum(grid.num_candidates(call[0]) for call in calls)) as advance:
        for problems in calls:
            entry, rejected = _measured(problems, device, timer, grid, advance)
            others = (old for old in table.entries if old.shape != entry.shape)
            table = replace(table, entries=(*others, entry))
            # A run that is cut short leaves a table that can be used.
            with writing(destination):
                write_file(destination, table.to_json().encode())
            reports.append((entry, rejected))
    for entry, rejected in reports:
        _print(entry, rejected)


def _measured(
    problems: Sequence["Problem"],
    device: "torch.device",
    timer: "Timer",
    grid: "Grid",
    advance: Callable[[], None],
) -> "tuple[Entry, list[tuple[Candidate, str]]]":
    """The entry of one shape, and the candidates that did not count. ``advance`` is called after each."""
    from fsa_core.tuning import Bench, NothingRuns, tune

    bench = Bench(problems, device, timer)

    def measure(candidate: "Candidate") -> float | None:
        seconds = bench(candidate)
        advance()
        return seconds

    try:
        return tune(problems[0], measure, grid), bench.rejected
    except NothingRuns as error:
        raise CommandFailed(f"{error}: {bench.rejected[0][1]}") from error


def _with_entries_of(destination: Path, table: "Table") -> "Table":
    from fsa_core.tuning_table import TuningError, read_table

    if not destination.exists():
        return table
    try:
        old = read_table(destination)
    except TuningError as error:
        raise CommandFailed(f"{error}; remove it, or name another with --output") from error
    for name in _SAME_IN_A_TABLE:
        if old.provenance.get(name) != table.provenance[name]:
            raise CommandFailed(
                f"{destination} was measured with another {name} ({old.provenance.get(name)}, "
                f"now {table.provenance[name]}); remove it, or name another with --output"
            )
    return replace(table, entries=old.entries)


def _print(entry: "Entry", rejected: "list[tuple[Candidate, str]]") -> None:
    print(f"{entry.shape}: {entry.path} ({_times(entry.seconds)})", flush=True)
    if entry.backward_path is not None:
        print(f"  gradients: {entry.backward_path} ({_times(entry.backward_seconds)})", flush=True)
    for candidate, why in rejected:
        print(f"  did not count: {candidate.path} {candidate.tuning}: {why}", file=sys.stderr)


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{path} {format_seconds(one)}" for path, one in seconds.items())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, and what moves it on by one; none where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("candidates"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)

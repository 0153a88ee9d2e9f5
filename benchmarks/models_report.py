"""The table and the plot of real models' layers: ``python -m benchmarks.models_report FILE.json``."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.models_results import GOALS, PHASES, ModelResults, ModelRow, mean_times_faster
from benchmarks.plots import COLORS, write_figures

GIB = 1 << 30
TABLE_WIDTH = 140
BAR_WIDTH = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models_report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="the plots are written beside it")
    path = parser.parse_args().file
    results = ModelResults.read(path)
    print_table(results)
    for written in draw(results, path):
        print(written)


def print_table(results: ModelResults) -> None:
    """Every time, what was refused and why, and the goals that something was measured of."""
    table = Table(
        "model", "tokens", "phase", "attention", "ms a layer", "tokens/s", "memory, GiB", "NSA / it"
    )
    for column in (*table.columns[1:2], *table.columns[4:]):
        column.justify = "right"
    for row in results.rows:
        for name in row.contenders:
            table.add_row(row.model, f"{row.num_tokens:,}", row.phase, name, *_numbers(row, name))
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    for phase, goal in GOALS.items():
        mean = mean_times_faster(results.rows, phase, "ours")
        if mean is not None:
            verdict = "PASS" if mean >= goal else "MISS"
            print(f"{phase}: NSA / ours {mean:.3g}, geometric mean; wanted {goal:g}: {verdict}")


def draw(results: ModelResults, beside: Path) -> list[Path]:
    """Writes the plots, named after ``beside``."""
    return write_figures(_figures(results), beside)


def _numbers(row: ModelRow, name: str) -> tuple[str, ...]:
    measured, seconds = row.contenders[name], row.layer_seconds(name)
    if seconds is None or measured.median_seconds is None:
        return ((measured.refused or "").split("\n")[0][:40],)
    memory = "" if measured.extra_bytes is None else f"{measured.extra_bytes / GIB:.1f}"
    ratio = row.times_faster(name)
    speed = f"{row.num_tokens / measured.median_seconds:,.0f}"
    return f"{seconds * 1e3:.1f}", speed, memory, "" if ratio is None else f"{ratio:.2f}"


def _figures(results: ModelResults) -> Iterator[tuple[str, Figure]]:
    for phase in PHASES:
        rows = [row for row in results.rows if row.phase == phase]
        if not rows:
            continue
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(name for row in rows for name in row.contenders))
        for number, name in enumerate(names):
            places = [i + (number - (len(names) - 1) / 2) * BAR_WIDTH for i in range(len(rows))]
            # No bar where nothing was measured.
            heights = [(row.layer_seconds(name) or 0.0) * 1e3 for row in rows]
            axes.bar(places, heights, BAR_WIDTH, color=COLORS[name], label=name)
        labels = [f"{row.model}\n{row.num_tokens // 1024}K" for row in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylabel(f"{phase}, ms a layer")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
        yield phase, figure


if __name__ == "__main__":
    main()

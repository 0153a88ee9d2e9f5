"""The table and the plot of a training run: ``python -m benchmarks.training_report FILE.json``."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.plots import COLORS, write_figures
from benchmarks.training_results import TrainingResults

MIB = 1 << 20
LABELS = {"sparse": ("Native Sparse Attention", COLORS["ours"]), "dense": ("dense", COLORS["dense causal"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    path = parser.parse_args().file
    results = TrainingResults.read(path)
    print_table(results)
    for written in draw(results, path):
        print(written)


def print_table(results: TrainingResults) -> None:
    table = Table("attention", "parameters", "held-out loss, nats a byte", "seconds", "tokens/s", "memory")
    for column in table.columns[1:]:
        column.justify = "right"
    tokens = results.options["steps"] * results.options["sequences"] * results.options["length"]
    for name, run in results.runs.items():
        memory = "" if run.peak_bytes is None else f"{run.peak_bytes / MIB:,.0f} MiB"
        speed = f"{tokens / run.seconds:,.0f}"
        table.add_row(
            name, f"{run.parameters:,}", f"{run.final_loss:.4f}", f"{run.seconds:.1f}", speed, memory
        )
    Console().print(table)
    print(f"sparse / dense: {results.final_ratio:.4f}")


def draw(results: TrainingResults, beside: Path) -> list[Path]:
    """Writes the plot, named after ``beside``."""
    return write_figures(_figures(results), beside)


def _figures(results: TrainingResults) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, run in results.runs.items():
        label, color = LABELS[name]
        axes.plot(*zip(*run.training, strict=True), color=color, linewidth=0.8, alpha=0.5)
        axes.plot(
            *zip(*run.validation, strict=True),
            color=color,
            marker="o",
            markersize=3,
            label=f"{label}, held out",
        )
    axes.set_xlabel(f"steps of {results.options['sequences'] * results.options['length']:,} bytes")
    axes.set_ylabel("loss, nats a byte")
    axes.set_ylim(top=min(axes.get_ylim()[1], 3.0))
    axes.grid(alpha=0.3)
    axes.legend()
    yield "loss", figure


if __name__ == "__main__":
    main()

"""The plot of ``benchmarks.perplexity``, as SVG; everything in it comes from the file of results."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.perplexity_results import PerplexityResults, Row
from benchmarks.plots import COLORS, write_figures

LABELS = {
    "selected": ("blocks selected by mean keys", COLORS["ours"], "o"),
    "recent": ("the first and the most recent blocks", COLORS["dense masked"], "s"),
}


def draw(results: PerplexityResults, beside: Path) -> list[Path]:
    """Writes the plot, named after ``beside``."""
    return write_figures(_figures(results), beside)


def _figures(results: PerplexityResults) -> Iterator[tuple[str, Figure]]:
    texts = results.rows_by_text()
    figure = Figure(figsize=(0.6 + 2.3 * len(texts), 3.1), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, (text, rows) in zip(panels, texts.items(), strict=True):
        _panel(axes, rows)
        axes.set_title(text, fontsize=9)
    panels[0].set_ylabel("perplexity of the second half")
    handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        f"{results.model}, not trained for sparsity, {results.num_tokens} tokens a text", fontsize=10
    )
    yield "second_half", figure


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    dense = next(row for row in rows if row.setting.rule == "dense")
    axes.axhline(
        dense.second_half_perplexity,
        label="dense",
        color=COLORS["dense causal"],
        linewidth=1.2,
        linestyle="--",
    )
    for rule, (label, color, marker) in LABELS.items():
        points = [(row.setting.top_k, row.second_half_perplexity) for row in rows if row.setting.rule == rule]
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=4)
    sparse = [row for row in rows if row.setting.rule == "selected"]
    axes.set_xscale("log")
    axes.set_xticks([row.setting.top_k for row in sparse])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda blocks, _: f"{blocks:g}"))
    axes.minorticks_off()
    axes.set_xlabel(f"blocks of {sparse[0].setting.block_size} a token")

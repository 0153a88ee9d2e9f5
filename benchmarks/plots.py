"""Plots of a file of results, as SVG; everything in them comes from the file."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.cases import STAGES, Case
from benchmarks.results_file import Ceilings, Results, Row
from benchmarks.targets import MIB, SPARSE_PEERS

# Colours of Okabe and Ito, which people who see fewer of them can tell apart.
COLORS = {
    "ours": "#0072B2",
    "fsa": "#D55E00",
    "nsa": "#009E73",
    "sfnsa": "#CC79A7",
    "dense cuDNN": "#7F7F7F",
    "dense FlashAttention": "#56B4E9",
    "dense causal": "#7F7F7F",
    "dense masked": "#E69F00",
    "cuDNN at as many keys": "#7F7F7F",
    "FlashAttention at as many keys": "#56B4E9",
    "torch at as many keys": "#7F7F7F",
}
MARKERS = {"random": "o", "real": "s", "recorded": "D", "same": "^"}
WORKSPACE_MIB = 256
STYLE = {
    "svg.fonttype": "none",
    # The same file from the same numbers.
    "svg.hashsalt": "fsa",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}

Value = Callable[[Row, str], float | None]


def draw(results: Results, beside: Path) -> list[Path]:
    """Writes the plots that these results have the data for, named after ``beside``."""
    return write_figures(_figures(results), beside)


def write_figures(figures: Iterator[tuple[str, Figure]], beside: Path) -> list[Path]:
    """Writes each figure, drawn in the style of all, under the name that comes with it."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures:
            path = beside.with_name(f"{beside.stem}_{name}.svg")
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            written.append(path)
    return written


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    rows = [row for row in results.rows if not row.red and row.case.clock == "device"]
    layouts = list(dict.fromkeys(row.case.layout for row in rows))
    for layout, stage in product(layouts, STAGES):
        curves = [row for row in rows if (row.case.layout, row.case.stage) == (layout, stage)]
        if len({row.case.num_tokens for row in curves}) < 2:
            continue
        # The first layout of a file is its main one.
        suffix = "" if layout == layouts[0] else f"_{layout}"
        title = f"{stage}, {_described(curves[0].case)}, {results.machine['device']}"
        yield f"latency_{stage}{suffix}", _by_length(curves, _milliseconds, "ms", title)
        # What a contender takes hardly depends on the indices; the last kind of a suite is the lifelike one.
        one_kind = [row for row in curves if row.case.kind == curves[-1].case.kind]
        if any(_extra_mib(row, name) for row in one_kind for name in row.contenders):
            title = f"memory beyond inputs and answer, {title}; dotted: the bound of ours"
            figure = _by_length(one_kind, _extra_mib, "MiB", title)
            for axes in figure.axes:
                axes.axhline(WORKSPACE_MIB, color="black", linewidth=0.8, linestyle=":")
            lowest, highest = figure.axes[0].get_ylim()
            figure.axes[0].set_ylim(min(lowest, WORKSPACE_MIB / 16), max(highest, WORKSPACE_MIB * 2))
            yield f"memory_{stage}{suffix}", figure
    if results.ceilings and any(row.work and row.work.flops for row in rows):
        yield "roofline", _roofline(rows, results.ceilings, results.machine["device"])


def _by_length(rows: Sequence[Row], value: Value, unit: str, title: str) -> Figure:
    """A panel for every group size and kind of indices, a line for every contender."""
    kinds = list(dict.fromkeys(row.case.kind for row in rows))
    groups = sorted({row.case.group_size for row in rows})
    figure = Figure(figsize=(0.6 + 2.2 * len(groups), 0.8 + 2.1 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(groups), sharex=True, sharey=True, squeeze=False)
    for (down, kind), (across, group) in product(enumerate(kinds), enumerate(groups)):
        axes = panels[down][across]
        cells = [row for row in rows if (row.case.kind, row.case.group_size) == (kind, group)]
        _lines(axes, cells, value)
        indices = f", {kind} indices" if rows[0].case.part == "selected" else ""
        axes.set_title(f"g = {group}{indices}", fontsize=9)
        if across == 0:
            axes.set_ylabel(unit)
        if down == len(kinds) - 1:
            axes.set_xlabel("tokens")
    _log_axes(panels[0][0], sorted({row.case.num_tokens for row in rows}))
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(title, fontsize=10)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], value: Value) -> None:
    for name in dict.fromkeys(name for row in rows for name in row.contenders):
        points = sorted((row.case.num_tokens, y) for row in rows if (y := value(row, name)))
        if points:
            ours = name == "ours"
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=COLORS[name],
                marker="o",
                markersize=4 if ours else 3,
                linewidth=2 if ours else 1.2,
                linestyle="--" if name.startswith("dense") else "-",
                zorder=3 if ours else 2,
            )


def _log_axes(axes: Axes, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens if len(tokens) < 5 else tokens[::3], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _short(n)))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(_plain)


def _roofline(rows: Sequence[Row], ceilings: Ceilings, device: str) -> Figure:
    """Work that no implementation can do without, over the time it took, beside what the machine can do."""
    stages = [stage for stage in STAGES if any(row.case.stage == stage for row in rows)]
    figure = Figure(figsize=(1 + 4 * len(stages), 4), layout="constrained")
    for axes, stage in zip(
        figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages, strict=True
    ):
        cells = [
            row for row in rows if row.case.stage == stage and row.work and row.case.dtype == ceilings.dtype
        ]
        _roof(axes, cells, ceilings)
        for name, label in (("ours", "ours"), ("peer", "fastest sparse peer")):
            _positions(axes, cells, name, label)
        axes.set(title=stage, xlabel="FLOP a byte that must move", xscale="log", yscale="log")
        _name_groups(axes, cells, ceilings)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(_plain)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("TFLOP/s")
    handles = {line.get_label(): line for line in figure.axes[0].get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"roofline, columns by g, {device}: {_ceilings_text(ceilings)}", fontsize=10)
    return figure


def _roof(axes: Axes, rows: Sequence[Row], ceilings: Ceilings) -> None:
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    intensities = [row.work.flops / row.work.bytes for row in rows if row.work]
    left, right = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    corners = [left, ridge, right]
    heights = [min(x * ceilings.bytes_per_second, ceilings.flops_per_second) / 1e12 for x in corners]
    axes.plot(corners, heights, color="black", linewidth=1, label="measured ceilings")


def _name_groups(axes: Axes, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Over the points of each group size: what a case computes for a byte depends on little else."""
    top = ceilings.flops_per_second / 1e12
    axes.set_ylim(top=2 * top)
    for number, group in enumerate(sorted({row.case.group_size for row in rows})):
        intensity = median(
            row.work.flops / row.work.bytes for row in rows if row.work and row.case.group_size == group
        )
        # Large groups lie close together.
        height = top * (1.15 if number % 2 else 1.45)
        axes.text(intensity, height, f"{group}", ha="center", fontsize=8)


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _positions(axes: Axes, rows: Sequence[Row], name: str, label: str) -> None:
    for kind in dict.fromkeys(row.case.kind for row in rows):
        points = [
            (row.work.flops / row.work.bytes, row.work.flops / seconds / 1e12)
            for row in rows
            if row.case.kind == kind and row.work and (seconds := _fastest(row, name))
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=f"{label}, {kind}",
                color=COLORS["ours"] if name == "ours" else "#BFBFBF",
                marker=MARKERS[kind],
                markersize=4,
                linestyle="",
            )


def _fastest(row: Row, name: str) -> float | None:
    if name == "ours":
        return row.seconds(name)
    return min((seconds for peer in SPARSE_PEERS if (seconds := row.seconds(peer))), default=None)


def _milliseconds(row: Row, contender: str) -> float | None:
    seconds = row.seconds(contender)
    return None if seconds is None else seconds * 1e3


def _extra_mib(row: Row, contender: str) -> float | None:
    measured = row.contenders.get(contender)
    return None if measured is None or measured.extra_bytes is None else measured.extra_bytes / MIB


def _described(case: Case) -> str:
    dims = f"{case.head_dim}" if case.value_dim == case.head_dim else f"{case.head_dim} and {case.value_dim}"
    return f"{case.num_kv_heads} KV heads of {dims}, {case.num_slots} blocks of {case.block_size}"


def _short(tokens: float) -> str:
    return f"{tokens / 2**20:g}M" if tokens >= 2**20 else f"{tokens / 2**10:g}K"


def _ceilings_text(ceilings: Ceilings) -> str:
    flops, moved = ceilings.flops_per_second / 1e12, ceilings.bytes_per_second / 1e12
    return f"{flops:.3g} TFLOP/s in {ceilings.dtype}, {moved:.3g} TB/s, measured in the same run"

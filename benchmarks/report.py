"""What a file of results says: ``python -m benchmarks.report FILE.json`` prints goals and draws plots.

``--markdown`` prints the table that the README has of selected attention instead.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import OPERATOR_GROUP_SIZES, Case, suite
from benchmarks.results_file import Results, Row
from benchmarks.targets import break_even, verdicts

STYLES = {"PASS": "green", "MISS": "red", "PARTLY": "yellow"}
PEERS = {"FSA reference": "fsa", "NSA Triton": "nsa", "SFNSA": "sfnsa"}
# Tokens of the README's table.
LENGTHS = (8192, 65536)
COMBINED = {"_geometric_mean": "geometric mean", "min": "least", "max": "most", "_growth": "ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, metavar="FILE.json", help="the plots are written beside it")
    parser.add_argument("--markdown", action="store_true", help="print the README's table, and no more")
    options = parser.parse_args()
    results = Results.read(options.results)
    if options.markdown:
        print("\n".join(markdown_table(results)))
        return
    print("  ".join(f"{name} {value}" for name, value in results.machine.items()))
    print_targets(results)
    # matplotlib is an extra that measuring does not need.
    from benchmarks.plots import draw

    for path in draw(results, options.results):
        print(path)


def print_targets(results: Results) -> None:
    """A table of the goals that these results say something about; nothing if there are none."""
    table = Table("goal", "", "cases", "measured", "wanted", "")
    for column in table.columns[2:5]:
        column.justify = "right"
    for verdict in verdicts(results):
        goal = verdict.goal
        wanted = f"{'<=' if goal.at_most else '>='} {goal.bound:g} {goal.unit}"
        table.add_row(
            goal.name,
            COMBINED[goal.combine.__name__],
            f"{verdict.measured}/{len(goal.cases)}",
            f"{verdict.value:.3g} {goal.unit}",
            wanted,
            verdict.status,
            style=STYLES[verdict.status],
        )
    if table.row_count:
        # Wider than a terminal rather than cut into many lines; a pipe has no width of its own.
        Console(width=max(Console().width, 140)).print(table)
    for g in OPERATOR_GROUP_SIZES:
        if tokens := break_even(results, g):
            print(f"g = {g}: the whole operator is faster than dense cuDNN from {tokens:,.0f} tokens on")


def markdown_table(results: Results) -> Iterator[str]:
    """Its lines: milliseconds of the shortest and the longest cases with 4 KV heads and 16 blocks of 64."""
    columns = ["pass, tokens, indices", "g", "ours", *PEERS, "dense cuDNN", "fastest peer / ours"]
    yield f"| {' | '.join(columns)} | extra MiB, ours |"
    yield "|---" * (len(columns) + 1) + "|"
    rows = {row.case: row for row in results.rows}
    for case in suite("targets"):
        is_plain = case == Case(case.num_tokens, case.group_size, case.kind, case.stage)
        if is_plain and case.num_tokens in LENGTHS and case in rows:
            yield _markdown_row(rows[case])


def _markdown_row(row: Row) -> str:
    case, ours = row.case, row.contenders["ours"]
    seconds = ours.median_seconds or math.nan
    peers = [row.seconds(name) or math.nan for name in PEERS.values()]
    times = [seconds, *peers, row.seconds("dense cuDNN") or math.nan]
    cells = [
        f"{case.stage}, {case.num_tokens // 1024}K, {case.kind}",
        str(case.group_size),
        *(_milliseconds(x) for x in times),
        f"{min(peers) / seconds:.1f}",
        f"{(ours.extra_bytes or 0) / 2**20:.0f}",
    ]
    cells[2] = f"**{cells[2]}**"
    return f"| {' | '.join(cells)} |"


def _milliseconds(seconds: float) -> str:
    """Three digits, or two behind the point."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


if __name__ == "__main__":
    main()

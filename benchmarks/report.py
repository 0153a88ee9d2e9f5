"""What a file of results says: ``python -m benchmarks.report FILE.json`` prints goals and draws plots."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import OPERATOR_GROUP_SIZES
from benchmarks.results_file import Results
from benchmarks.targets import break_even, verdicts

STYLES = {"PASS": "green", "MISS": "red", "PARTLY": "yellow"}
COMBINED = {"_geometric_mean": "geometric mean", "min": "least", "max": "most", "_growth": "ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, metavar="FILE.json", help="the plots are written beside it")
    options = parser.parse_args()
    results = Results.read(options.results)
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


if __name__ == "__main__":
    main()

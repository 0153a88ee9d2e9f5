"""``python -m benchmarks.perplexity_report FILE.json`` prints what was measured as a table and draws it."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.perplexity_results import PerplexityResults


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity_report", description=__doc__)
    parser.add_argument("results", type=Path, metavar="FILE.json", help="the plot is written beside it")
    options = parser.parse_args()
    results = PerplexityResults.read(options.results)
    print("  ".join(f"{name} {value}" for name, value in results.machine.items()))
    print_table(results)
    # matplotlib is an extra that measuring does not need.
    from benchmarks.perplexity_plot import draw

    for path in draw(results, options.results):
        print(path)


def print_table(results: PerplexityResults) -> None:
    """The second half of a text first, since that is where sparsity costs."""
    columns = ("second half", "x dense", "whole text", "keys attended", "seconds")
    table = Table("text", "attention", *columns, title=f"perplexity, {results.num_tokens} tokens a text")
    for column in table.columns[2:]:
        column.justify = "right"
    for rows in results.rows_by_text().values():
        dense = next(row for row in rows if row.setting.rule == "dense")
        for row in rows:
            table.add_row(
                row.text,
                row.setting.name,
                f"{row.second_half_perplexity:.2f}",
                f"{row.second_half_perplexity / dense.second_half_perplexity:.3f}",
                f"{row.perplexity:.2f}",
                f"{row.share_of_keys:.0%}",
                f"{row.seconds:.0f}",
            )
        table.add_section()
    Console(width=max(Console().width, 100)).print(table)


if __name__ == "__main__":
    main()

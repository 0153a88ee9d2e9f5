"""What is told of results is what the README says."""

from pathlib import Path

from benchmarks.report import markdown_table
from benchmarks.results_file import Results

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_table_of_the_results_beside_it() -> None:
    results = Results.read(ROOT / "benchmarks/results/selected_attention_h200.json")
    lines = list(markdown_table(results))
    # Two stages, two lengths, two kinds of indices and five group sizes, under two lines of heading.
    assert len(lines) == 42
    assert "\n".join(lines) in (ROOT / "README.md").read_text()

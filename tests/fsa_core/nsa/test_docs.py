import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs" / "nsa.md"


def test_the_examples_of_the_documentation_run():
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})  # noqa: S102

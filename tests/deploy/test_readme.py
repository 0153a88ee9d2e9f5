"""The README's Python runs as it stands, against a real server."""

import re
from pathlib import Path

import pytest

from tests.serving import ServerProcess

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
DEFAULT_TARGET = "127.0.0.1:50051"


def test_there_are_examples() -> None:
    assert any(DEFAULT_TARGET in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block: str, server: ServerProcess) -> None:
    exec(compile(block.replace(DEFAULT_TARGET, f"127.0.0.1:{server.port}"), str(README), "exec"), {})  # noqa: S102


def test_no_document_installs_the_package_from_an_index_that_has_none() -> None:
    documents = [README, *(README.parent / "docs").glob("*.md")]
    assert [
        path.name for path in documents if re.search(r"pip install ['\"]?fsa-serve", path.read_text())
    ] == []

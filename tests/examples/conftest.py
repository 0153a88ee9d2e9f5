"""The examples' modules, imported as the examples import one another."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MISSING = [name for name in ("accelerate", "gguf", "rich", "transformers") if find_spec(name) is None]

sys.path.insert(0, str(EXAMPLES))


class Unimported(pytest.Module):
    """A module that is skipped as it stands: it would import what is missing."""

    def collect(self) -> NoReturn:
        pytest.skip(f"the examples need {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Unimported | None:
    return Unimported.from_parent(parent, path=module_path) if MISSING else None

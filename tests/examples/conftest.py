"""The examples' modules, imported as the examples import one another."""

import sys
from pathlib import Path

import pytest

for package in ("accelerate", "gguf", "rich", "transformers"):
    pytest.importorskip(package, reason="a dependency of the examples")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

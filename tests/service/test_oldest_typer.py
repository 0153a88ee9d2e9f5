"""The oldest typer that pyproject.toml allows works with the click that is pinned."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

ROOT = Path(__file__).resolve().parents[2]


def test_help_is_printed(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if request.config.getoption("--device") == "cuda":
        pytest.skip("make test-gpu runs without a network; this installs packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (typer,) = (one for one in project["optional-dependencies"]["server"] if one.startswith("typer>="))
    (click,) = (one for one in (ROOT / "constraints.txt").read_text().split() if one.startswith("click=="))
    packages = [typer.replace(">=", "=="), click]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, *packages], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for words in (["--help"], ["bench", "--help"]):
        command = [sys.executable, "-m", "service.cli", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--help" in done.stdout

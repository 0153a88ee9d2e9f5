"""The base install is a whole client: no torch, no triton, no server.

The one test that makes an environment and fills it from the package index that pip is set up with.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.serving import ServerProcess

pytestmark = pytest.mark.network

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the package and its base dependencies, and nothing else."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("make test-gpu runs without a network; this installs packages")
    folder = tmp_path_factory.mktemp("client-only")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a copy: the build writes beside its sources
        shutil.copy(ROOT / name, source)
    for package in ("service", "fsa_core"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(environment)
    interpreter = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", source], check=True)
    return interpreter


def run(python: Path, folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """Runs the environment's interpreter where only what is installed can be found."""
    command = [python, "-I", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("module", ["torch", "triton", "typer", "pydantic"])
def test_nothing_of_the_server_is_installed(python: Path, tmp_path: Path, module: str) -> None:
    assert f"No module named '{module}'" in run(python, tmp_path, "-c", f"import {module}").stderr


@pytest.mark.parametrize("words", [["service.cli", "info"], ["service"]])
def test_the_command_line_says_how_to_install_it(python: Path, tmp_path: Path, words: list[str]) -> None:
    done = run(python, tmp_path, "-m", *words)
    assert done.returncode == 1
    assert done.stderr == (
        "fsa: the command line is not in the base install; "
        "pip install '.[server]' in the source folder adds it\n"
    )


def test_the_quickstart_runs_against_a_server(python: Path, tmp_path: Path, server: ServerProcess) -> None:
    done = run(python, tmp_path, ROOT / "examples" / "client_quickstart.py", server.target)
    assert done.returncode == 0, done.stderr
    assert "out (512, 8, 64) float16 lse (512, 8)" in done.stdout
    assert "refused: " in done.stdout

"""``python -m service`` is ``fsa serve`` without flags, and fails as it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*words: str, **settings: object) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FSA_")}
    environment |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "service", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_broken_file_is_wrong_usage_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("port = ")
    done = run(FSA_CONFIG=file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fsa: the settings cannot be read: Invalid value")
    assert done.stderr.count("\n") == 1


def test_a_wrong_value_is_wrong_usage_in_one_line() -> None:
    done = run(FSA_PORT=70000)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fsa: port: Input should be less than or equal to 65535, not '70000'\n"


@pytest.mark.parametrize("word", ["--port=0", "--help", "serve"])
def test_arguments_are_refused(word: str) -> None:
    done = run(word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fsa: python -m service takes no arguments, not {word}; fsa serve does\n"

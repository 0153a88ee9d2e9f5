"""The container's health check asks the server that the settings describe; what is wrong is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ServerProcess

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


def check(**settings: object) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FSA_")}
    environment |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_the_port_may_be_in_a_file(server: ServerProcess, tmp_path: Path, host: str) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text(f'port = {server.port}\nhost = "{host}"\n')
    done = check(FSA_CONFIG=file)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_wins_over_the_file(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("port = 1\n")
    assert check(FSA_CONFIG=file, FSA_PORT=server.port).returncode == 0


def test_a_server_that_is_not_there_is_one_line() -> None:
    done = check(FSA_PORT=1)
    assert done.returncode == 1
    assert done.stderr.startswith("127.0.0.1:1: UNAVAILABLE: ")
    assert done.stderr.count("\n") == 1


def test_settings_that_cannot_be_read_are_one_line() -> None:
    done = check(FSA_PORT="many")
    assert done.returncode == 1
    assert done.stderr.startswith("port: Input should be a valid integer")
    assert done.stderr.count("\n") == 1

"""The ``fsa`` command as its user meets it: what it prints, where, and its exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from service.cli import main
from service.config import Settings

NOBODY = "127.0.0.1:1"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Fsa = Callable[..., Outcome]


@pytest.fixture
def fsa(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fsa:
    """Runs ``fsa`` with the given words in this process."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fsa", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        return Outcome(code if isinstance(code, int) else 1, *capfd.readouterr())

    return run


def test_help_lists_the_commands_and_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sys.modules))\n"
        "sys.argv = ['fsa', '--help']\n"
        "from service.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    text, loaded = done.stdout.split("LOADED")
    assert all(name in text for name in ("serve", "config", "info", "attend", "bench"))
    heavy = {"torch", "triton", "numpy", "grpc", "google.protobuf", "pydantic", "rich", "safetensors"}
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize("words", [["serve", "--prot", "1"], ["nonsense"], ["attend"], ["bench", "--slots", "-1"]])
def test_wrong_usage_is_exit_code_2_on_standard_error(fsa: Fsa, words: list[str]) -> None:
    outcome = fsa(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Error: " in outcome.err


@pytest.mark.parametrize("command", ["info", "bench"])
def test_a_server_that_is_not_there_is_one_line_that_says_what_to_do(fsa: Fsa, command: str) -> None:
    outcome = fsa(command, "--target", NOBODY)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"fsa: no server answers at {NOBODY}; start one with `fsa serve`")
    assert outcome.err.count("\n") == 1


class TestConfig:
    def test_names_the_source_of_every_value(
        self, fsa: Fsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "fsa.toml"
        file.write_text("port = 1234\nmax_tokens = 99\n")
        monkeypatch.setenv("FSA_PORT", "4321")
        outcome = fsa("config", "--config", file, "--json")
        settings = json.loads(outcome.out)
        assert outcome.code == 0
        assert set(settings) == set(Settings.model_fields)
        assert settings["port"] == {"value": 4321, "source": "environment"}
        assert settings["max_tokens"] == {"value": 99, "source": "file"}
        assert settings["devices"] == {"value": "auto", "source": "default"}
        assert settings["config"]["source"] == "flag"

    def test_prints_a_table_for_people(self, fsa: Fsa) -> None:
        lines = fsa("config").out.splitlines()
        assert lines[0].split() == ["SETTING", "VALUE", "SOURCE"]
        assert ["port", "50051", "default"] in [line.split() for line in lines]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("port = 70000", "port: Input should be less than or equal to 65535, not 70000"),
            ("prot = 1", "prot: Extra inputs are not permitted, not 1"),
            ("port = ", "the settings cannot be read"),
        ],
    )
    def test_a_wrong_file_is_wrong_usage_in_one_line(
        self, fsa: Fsa, tmp_path: Path, text: str, message: str
    ) -> None:
        file = tmp_path / "fsa.toml"
        file.write_text(text)
        for command in ("config", "serve"):
            outcome = fsa(command, "--config", file)
            assert (outcome.code, outcome.out) == (2, "")
            assert outcome.err.startswith(f"fsa: {message}")
            assert outcome.err.count("\n") == 1


class TestServe:
    def test_every_flag_is_a_setting(self, fsa: Fsa) -> None:
        words = fsa("serve", "--help").out.split()
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert flags - {"help", "no_reflection"} <= set(Settings.model_fields)

    def test_runs_with_the_flags_and_stops_at_ctrl_c(self) -> None:
        command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--metrics-port", "0"]
        with subprocess.Popen(
            [*command, "--devices", "cpu", "--log-format", "text"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["event"] == "listening"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors

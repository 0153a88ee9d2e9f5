"""``fsa config``: every value, where it is from, and one line where a file or a variable is wrong."""

import json
from pathlib import Path

import pytest

from service.config import Settings
from tests.service.conftest import Fsa


def test_names_the_source_of_every_value(fsa: Fsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_prints_a_table_for_people(fsa: Fsa) -> None:
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
def test_a_wrong_file_is_wrong_usage_in_one_line(fsa: Fsa, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text(text)
    for command in ("config", "serve"):
        outcome = fsa(command, "--config", file)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"fsa: {message}")
        assert outcome.err.count("\n") == 1


def test_a_name_in_capitals_is_found_in_the_file(fsa: Fsa, tmp_path: Path) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("PORT = 50052\n")
    settings = json.loads(fsa("config", "--config", file, "--json").out)
    assert settings["port"] == {"value": 50052, "source": "file"}
    assert settings["metrics_port"]["source"] == "default"


def test_what_it_prints_is_json_or_refused(fsa: Fsa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSA_DRAIN_GRACE_SECONDS", "inf")
    outcome = fsa("config", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "fsa: drain_grace_seconds: Input should be a finite number, not 'inf'\n"


def test_a_file_that_cannot_be_read_is_wrong_usage(fsa: Fsa) -> None:
    # A regular file whose first page is no memory.
    outcome = fsa("config", "--config", "/proc/self/mem")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("fsa: the settings cannot be read: ")
    assert outcome.err.count("\n") == 1

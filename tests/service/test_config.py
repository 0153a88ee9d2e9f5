"""Where a setting comes from, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from fsa_core import problem
from service import config
from service.config import Settings, unknown_variables


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FSA_")]:
        monkeypatch.delenv(name)


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("port = 1\nmetrics_port = 1\nmax_slots = 1\n")
    monkeypatch.setenv("FSA_PORT", "2")
    monkeypatch.setenv("FSA_METRICS_PORT", "2")
    settings = Settings(config=file, port=3)
    assert (settings.port, settings.metrics_port, settings.max_slots) == (3, 2, 1)
    assert settings.max_sequences == Settings().max_sequences


def test_the_environment_can_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("max_batch_delay_seconds = 0.25\n")
    monkeypatch.setenv("FSA_CONFIG", str(file))
    assert Settings().max_batch_delay_seconds == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("devices", "gpu"),
        ("devices", "cuda:0,cpu"),
        ("backend", "cudnn"),
        ("max_message_bytes", 2**31),
        ("max_inflight_bytes", 1),
        ("max_inflight_requests", 0),
        ("max_batch_requests", 1025),
        ("max_slots", 4097),
        ("drain_grace_seconds", float("inf")),
        ("batch_timeout_seconds", float("nan")),
        ("max_batch_delay_seconds", -1.0),
        ("log_level", "loud"),
        ("config", "/no/such/file.toml"),
        ("no_such_setting", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ValidationError, match="prot"):
        Settings(config=file)


def test_a_file_that_names_another_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fsa.toml"
    file.write_text('config = "other.toml"\n')
    with pytest.raises(SettingsError, match="config: a settings file cannot name another"):
        Settings(config=file)


def test_a_message_that_could_never_be_admitted_is_refused_as_a_limit() -> None:
    with pytest.raises(ValidationError, match="max_message_bytes"):
        Settings(max_message_bytes=128 << 20, max_inflight_bytes=64 << 20)


def test_a_variable_that_no_setting_is_named_by_is_found() -> None:
    environment = ("FSA_PORT", "FSA_TARGET", "FSA_MAX_INFLIGHT_REQUEST", "PATH")
    assert unknown_variables(environment) == ["FSA_MAX_INFLIGHT_REQUEST"]


def test_a_variable_in_small_letters_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSA_Port", "1234")
    assert Settings().port == 1234
    assert unknown_variables(["FSA_Port", "fsa_port", "Fsa_Prot"]) == ["Fsa_Prot"]


def test_variables_of_a_kubernetes_service_named_fsa_serve_are_no_misspelt_settings() -> None:
    links = ("FSA_SERVE_PORT", "FSA_SERVE_SERVICE_HOST", "FSA_SERVE_PORT_50051_TCP_ADDR")
    assert unknown_variables(links) == []


def test_no_more_slots_can_be_set_than_the_kernels_take() -> None:
    assert config.MAX_SLOTS == problem.MAX_SLOTS
    assert Settings(max_slots=config.MAX_SLOTS).max_slots == config.MAX_SLOTS


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_importing_the_settings_is_cheap() -> None:
    code = "import sys, service.config; print(*{'torch', 'grpc', 'numpy'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""

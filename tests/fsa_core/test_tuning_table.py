"""Tuning tables: what is read is what was written, the nearest source wins, and a bad file is named."""

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from fsa_core.plan import MIXED
from fsa_core.tiles import PartialTuning, SharedTuning, Tuning
from fsa_core.tuning_table import (
    ENVIRONMENT_VARIABLE,
    Entry,
    Shape,
    Table,
    TuningError,
    family,
    read_table,
    table_for,
    user_table_path,
)

TUNING = Tuning(PartialTuning(128, 2, 8, 200), SharedTuning(32, 2, 160, 3, 8))
ENTRY = Entry(
    Shape(4, 128, 64, 2, 64, 16), MIXED, TUNING, {"mixed": 0.5, "kv_major": 1.0}, "query_tile", {"mixed": 2.0}
)
TABLE = Table("nvidia-h200", (ENTRY,), {"torch": "2.11"})


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    table_for.cache_clear()
    yield tmp_path
    table_for.cache_clear()


def write(file: Path, table: Table = TABLE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(table.to_json())
    return file


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "table.json"))
    assert (table.device, table.entries, table.provenance) == (TABLE.device, TABLE.entries, TABLE.provenance)


def test_every_shipped_table_is_valid_and_named_for_its_device() -> None:
    files = [
        file for file in (resources.files("fsa_core") / "tuned").iterdir() if file.name.endswith(".json")
    ]
    assert files
    for file in files:
        assert read_table(file).device == file.name.removesuffix(".json")


def test_the_named_file_wins_over_the_users_and_that_over_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> str:
        table_for.cache_clear()
        table = table_for("NVIDIA H200")
        assert table is not None
        return table.source

    assert Path(source()).parent.name == "tuned"
    assert Path(source()).parts[-3] == "fsa_core"
    users = write(user_table_path("NVIDIA H200"))
    assert source() == str(users)
    named = write(tmp_path / "mine.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(named))
    assert source() == str(named)
    write(named, Table("nvidia-b200", (ENTRY,), {}))
    assert source() == str(users)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H200 NVL", True),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA H2000", False),
        ("cpu", False),
    ],
)
def test_a_table_serves_its_device_and_variants_of_it(name: str, found: bool) -> None:
    assert (table_for(name) is not None) == found


def test_names_of_devices_are_names_of_files() -> None:
    assert family("NVIDIA A100-SXM4-80GB (rev. 2)") == "nvidia-a100-sxm4-80gb-rev-2"


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(name)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["entries"][0].update(changes)


def _nested(part: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["entries"][0][part].update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("entries"), "the table has no entries"),
        (lambda document: document.update(device="NVIDIA H200"), "device is 'NVIDIA H200'"),
        (lambda document: document.update(extra=1), "the table has extra, which is not known"),
        (
            lambda document: document["entries"].append(document["entries"][0]),
            "two entries have the same shape",
        ),
        (
            lambda document: document["provenance"].update(torch=2.11),
            "provenance must be an object of strings",
        ),
        (_entry(path="union"), r"entries\[0\].path is 'union'; expected one of kv_major, query_tile, mixed"),
        (_entry(seconds=[1]), r"entries\[0\].seconds must be"),
        (_entry(backward_path="union"), r"entries\[0\].backward_path is 'union'; expected one of"),
        (_entry(backward_seconds={"mixed": "1"}), r"entries\[0\].backward_seconds must be"),
        (_entry(partial=None), r"entries\[0\].partial must be an object"),
        (_nested("partial", rows=48), r"partial.rows is 48; expected one of 16, 32, 64, 128, 256"),
        (_nested("partial", max_registers=True), "max_registers is True; expected 24 to 255"),
        (_nested("shared", shared_by=0), "shared_by is 0; expected 1 to 64"),
        (_nested("shape", max_slots=8), "max_slots is 8; expected one of 16, 32, 64"),
    ],
)
def test_a_bad_table_is_refused_with_its_name_and_the_place(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(TABLE.to_json())
    damage(document)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(document))
    with pytest.raises(TuningError, match=message) as caught:
        read_table(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", None])
def test_a_named_file_that_cannot_be_read_is_an_error_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    file = tmp_path / "named.json"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    with pytest.raises(TuningError, match=r"named\.json cannot be used"):
        table_for("NVIDIA H200")


@pytest.mark.parametrize("home", ["a name that is too long", "no folder"])
def test_a_home_that_may_not_be_entered_has_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "file").touch()
    # Root may enter every folder: what it cannot ask for either stands for one that it may not.
    homes = {"a name that is too long": tmp_path / ("n" * 256), "no folder": tmp_path / "file"}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(homes[home]))
    table = table_for("NVIDIA H200")
    assert table is not None
    assert Path(table.source).parts[-3] == "fsa_core"


def test_a_user_without_a_home_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert table_for("NVIDIA H200") is not None
    with pytest.raises(TuningError, match="no home folder for tuning tables; set XDG_CONFIG_HOME"):
        user_table_path("NVIDIA H200")

"""Tables of what was measured on a kind of GPU: which path a shape takes and how its tiles are cut.

A table is a JSON file that ``fsa tune`` writes. One for a device is looked for in the file that
FSA_TUNING_FILE names, in the user's configuration directory and among those shipped with the package.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fsa_core.plan import PATHS
from fsa_core.problem import Problem
from fsa_core.tiles import MIN_ROWS, PartialTuning, SharedTuning, Tuning, slot_class

ENVIRONMENT_VARIABLE = "FSA_TUNING_FILE"

_POWERS_OF_TWO = tuple(1 << power for power in range(13))
_ROWS = tuple(rows for rows in _POWERS_OF_TWO if MIN_ROWS <= rows <= 256)
_ALLOWED: dict[str, Iterable[int]] = {
    "rows": _ROWS,
    "tiles_per_item": range(1, 65),
    "num_warps": (1, 2, 4, 8, 16),
    "max_registers": range(24, 256),
    "num_stages": range(1, 9),
    "shared_by": range(1, 65),
    "heads_per_pair": range(1, 1025),
    "head_dim": range(16, 257),
    "value_dim": range(16, 257),
    "dtype_bytes": (2, 4),
    "block_size": (16, 32, 64, 128, 256),
    "max_slots": tuple(slots for slots in _POWERS_OF_TWO if slots == slot_class(slots)),
}


class TuningError(ValueError):
    """A table cannot be read or is not valid; the text names it and says what was expected."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a choice of kernels may depend on: nothing that packing requests into one call changes.

    Packing adds up tokens and sequences, so lengths are not in it. It pads rows of block indices to the
    longest, so of their slots only ``tiles.slot_class`` is: ``max_slots``.
    """

    heads_per_pair: int
    head_dim: int
    value_dim: int
    dtype_bytes: int
    block_size: int
    max_slots: int

    @classmethod
    def of(cls, problem: Problem) -> "Shape":
        p = problem
        slots = slot_class(p.num_slots)
        return cls(p.heads_per_pair, p.head_dim, p.value_dim, p.dtype.itemsize, p.block_size, slots)

    def __str__(self) -> str:
        dims = f"D={self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        blocks = f"up to {self.max_slots} blocks of {self.block_size}"
        return f"g={self.heads_per_pair} {dims} {8 * self.dtype_bytes}-bit {blocks}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What won for a shape. ``seconds``: the best geometric mean of each path, where they were compared.

    ``backward_path`` is the one that gradients take, with times of its own; None: that of the forward pass.
    """

    shape: Shape
    path: str
    tuning: Tuning
    seconds: Mapping[str, float] = field(default_factory=dict)
    backward_path: str | None = None
    backward_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """Entries for one kind of device; ``provenance`` says who measured what with which versions.

    ``source`` is where it was read from, for people.
    """

    device: str
    entries: tuple[Entry, ...]
    provenance: Mapping[str, str]
    source: str = ""

    def to_json(self) -> str:
        document = {
            "device": self.device,
            "provenance": dict(self.provenance),
            "entries": [_entry_to_json(entry) for entry in self.entries],
        }
        return json.dumps(document, indent=2) + "\n"


def family(device_name: str) -> str:
    """How tables name a device: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_table_path(device_name: str) -> Path:
    """Where a user's own table for a device lies. Raises TuningError where the user has no home folder."""
    return _user_folder() / f"{family(device_name)}.json"


@cache
def table_for(device_name: str) -> Table | None:
    """The first table found for a device, in the order that the module names; read once a process.

    A table serves every device whose name begins with its own: nvidia-h200 also "NVIDIA H200 NVL", unless
    there is one for that.

    Raises:
        TuningError: a table that had to be looked into is not valid.
    """
    names = _families(device_name)
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        table = read_table(Path(named))
        if table.device in names:
            return table
    places: list[Path | Traversable] = [resources.files("fsa_core") / "tuned"]
    with suppress(TuningError):
        places.insert(0, _user_folder())
    for file in (place / f"{name}.json" for place in places for name in names):
        if _is_there(file):
            return read_table(file)
    return None


def read_table(file: Path | Traversable) -> Table:
    """Raises TuningError."""
    try:
        return _parse_table(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, _Invalid) as error:
        raise TuningError(f"tuning table {file} cannot be used: {error}") from error


def _user_folder() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME")
    try:
        return Path(config or Path.home() / ".config") / "fsa-serve" / "tuned"
    except RuntimeError as error:
        raise TuningError("the user has no home folder for tuning tables; set XDG_CONFIG_HOME") from error


def _is_there(file: Path | Traversable) -> bool:
    """A file in a folder that may not be entered is as good as none."""
    try:
        return file.is_file()
    except OSError:
        return False


class _Invalid(Exception):
    """What is wrong, and where in the document."""


def _families(device_name: str) -> tuple[str, ...]:
    """The device's own name and shorter ones, longest first; never the vendor alone."""
    words = family(device_name).split("-")
    return tuple("-".join(words[:count]) for count in range(len(words), min(len(words), 2) - 1, -1))


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    document = {"shape": asdict(entry.shape), "path": entry.path, **asdict(entry.tuning)}
    optional = {
        "seconds": dict(entry.seconds),
        "backward_path": entry.backward_path,
        "backward_seconds": dict(entry.backward_seconds),
    }
    return document | {name: value for name, value in optional.items() if value}


def _parse_table(document: object, source: str) -> Table:
    table = _object(document, "the table", {"device", "provenance", "entries"})
    device, provenance, entries = table["device"], table["provenance"], table["entries"]
    if not isinstance(device, str) or family(device) != device:
        raise _Invalid(f"device is {device!r}; expected a name such as 'nvidia-h200'")
    if not isinstance(provenance, dict) or not all(isinstance(text, str) for text in provenance.values()):
        raise _Invalid("provenance must be an object of strings")
    if not isinstance(entries, list):
        raise _Invalid("entries must be a list")
    parsed = tuple(_parse_entry(entry, f"entries[{i}]") for i, entry in enumerate(entries))
    if len({entry.shape for entry in parsed}) != len(parsed):
        raise _Invalid("two entries have the same shape")
    return Table(device, parsed, provenance, source)


def _parse_entry(document: object, where: str) -> Entry:
    optional = {"seconds", "backward_path", "backward_seconds"}
    entry = _object(document, where, {"shape", "path", "partial", "shared"}, optional)
    for name in ("path", "backward_path"):
        if name in entry and entry[name] not in PATHS:
            raise _Invalid(f"{where}.{name} is {entry[name]!r}; expected one of {', '.join(PATHS)}")
    return Entry(
        shape=Shape(**_integers(entry["shape"], f"{where}.shape", Shape)),
        path=entry["path"],
        tuning=Tuning(
            PartialTuning(**_integers(entry["partial"], f"{where}.partial", PartialTuning)),
            SharedTuning(**_integers(entry["shared"], f"{where}.shared", SharedTuning)),
        ),
        seconds=_numbers(entry.get("seconds", {}), f"{where}.seconds"),
        backward_path=entry.get("backward_path"),
        backward_seconds=_numbers(entry.get("backward_seconds", {}), f"{where}.backward_seconds"),
    )


def _numbers(document: object, where: str) -> dict[str, float]:
    if not isinstance(document, dict) or not all(isinstance(x, int | float) for x in document.values()):
        raise _Invalid(f"{where} must be an object of numbers")
    return document


def _integers(document: object, where: str, of: type) -> dict[str, int]:
    """The fields of a dataclass, each in its range."""
    values = _object(document, where, {one.name for one in fields(of)})
    for name, value in values.items():
        if type(value) is not int or value not in _ALLOWED[name]:
            allowed = _ALLOWED[name]
            expected = (
                f"{allowed.start} to {allowed.stop - 1}"
                if isinstance(allowed, range)
                else f"one of {', '.join(map(str, allowed))}"
            )
            raise _Invalid(f"{where}.{name} is {value!r}; expected {expected}")
    return values


def _object(document: object, where: str, required: set[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise _Invalid(f"{where} must be an object")
    if missing := required - document.keys():
        raise _Invalid(f"{where} has no {', '.join(sorted(missing))}")
    if unknown := document.keys() - required - set(optional):
        raise _Invalid(f"{where} has {', '.join(sorted(unknown))}, which is not known")
    return document

"""What one run measured, as it is written to and read from JSON."""

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.cases import Case
from benchmarks.inputs import Work
from benchmarks.measure import Ceilings
from service.files import write_file


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender's times, or why it has none. Percentiles are None where only the median was kept."""

    median_seconds: float | None = None
    p20_seconds: float | None = None
    p80_seconds: float | None = None
    runs: int | None = None
    extra_bytes: int | None = None
    worst_error: float | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A case and what its contenders took. ``red``: our answer failed the gate, so nobody was timed."""

    case: Case
    work: Work | None = None
    contenders: dict[str, Measured] = field(default_factory=dict)
    red: str | None = None

    def seconds(self, contender: str) -> float | None:
        measured = self.contenders.get(contender)
        return None if measured is None else measured.median_seconds


@dataclass(slots=True)
class Results:
    machine: dict[str, str]
    command: str
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        rows = [_without_none(asdict(row)) | {"name": row.case.name} for row in self.rows]
        document = {
            "machine": self.machine,
            "command": self.command,
            "ceilings": self.ceilings and asdict(self.ceilings),
            "rows": rows,
        }
        write_json(path, document)

    @classmethod
    def read(cls, path: Path) -> "Results":
        document = json.loads(path.read_text())
        ceilings = document["ceilings"]
        return cls(
            machine=document["machine"],
            command=document["command"],
            ceilings=Ceilings(**ceilings) if ceilings else None,
            rows=[_row(row) for row in document["rows"]],
        )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file as a whole, so that a run that is cut short leaves the last complete one."""
    write_file(path, (json.dumps(document, indent=1) + "\n").encode())


def machine_of(device: torch.device) -> dict[str, str]:
    """What a number is worth nothing without."""
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cpu":
        facts["threads"] = str(torch.get_num_threads())
    if commit := _git("rev-parse", "--short", "HEAD"):
        facts["commit"] = commit + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    return facts


def _row(row: dict[str, Any]) -> Row:
    return Row(
        case=Case(**row["case"]),
        work=Work(**row["work"]) if "work" in row else None,
        contenders={name: Measured(**measured) for name, measured in row["contenders"].items()},
        red=row.get("red"),
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _cpu_name() -> str:
    """As Linux says it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    """Empty where there is no git or no checkout, as in a copy of the working tree."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()

"""What ``benchmarks.training`` measured, as it is written to and read from JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_json

# (step, nats a byte)
Curve = list[tuple[int, float]]


@dataclass(slots=True)
class Run:
    """One model. ``training`` losses are means since the point before; ``seconds`` without validation."""

    parameters: int
    training: Curve = field(default_factory=list)
    validation: Curve = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None

    @property
    def final_loss(self) -> float:
        """Of the held-out bytes."""
        return self.validation[-1][1]


@dataclass(slots=True)
class TrainingResults:
    machine: dict[str, str]
    command: str
    corpus: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def final_ratio(self) -> float:
        """The sparse model's final loss by the dense one's."""
        return self.runs["sparse"].final_loss / self.runs["dense"].final_loss

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "TrainingResults":
        document = json.loads(path.read_text())
        document["runs"] = {
            name: Run(
                **run | {key: [(step, loss) for step, loss in run[key]] for key in ("training", "validation")}
            )
            for name, run in document["runs"].items()
        }
        return cls(**document)

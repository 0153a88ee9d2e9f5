"""What ``benchmarks.models`` measured, as it is written to and read from JSON."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.results_file import Measured, write_json

Phase = Literal["training", "prefill"]
PHASES: tuple[Phase, ...] = ("training", "prefill")
# NSA's time by ours, geometric mean over models and lengths.
GOALS: dict[Phase, float] = {"training": 1.4, "prefill": 1.6}


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A step of ``num_layers`` layers under each attention.

    ``extra_bytes`` is what the step takes beside weights, the optimizer's moments and the input.
    """

    model: str
    num_tokens: int
    num_layers: int
    phase: Phase
    contenders: dict[str, Measured]

    def layer_seconds(self, contender: str) -> float | None:
        measured = self.contenders.get(contender)
        if measured is None or measured.median_seconds is None:
            return None
        return measured.median_seconds / self.num_layers

    def times_faster(self, contender: str) -> float | None:
        """NSA's time by the contender's."""
        nsa, own = self.layer_seconds("nsa"), self.layer_seconds(contender)
        return None if nsa is None or own is None else nsa / own


@dataclass(slots=True)
class ModelResults:
    machine: dict[str, str]
    command: str
    rows: list[ModelRow] = field(default_factory=list)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "ModelResults":
        document = json.loads(path.read_text())
        rows = [
            ModelRow(**row | {"contenders": {name: Measured(**m) for name, m in row["contenders"].items()}})
            for row in document["rows"]
        ]
        return cls(document["machine"], document["command"], rows)


def mean_times_faster(rows: Iterable[ModelRow], phase: Phase, contender: str) -> float | None:
    """Geometric mean of ``times_faster`` over the rows of a phase that have both; None if none has."""
    ratios = [ratio for row in rows if row.phase == phase and (ratio := row.times_faster(contender))]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

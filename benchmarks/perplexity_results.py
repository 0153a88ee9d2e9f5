"""What ``benchmarks.perplexity`` measured, as it is written to and read from JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.results_file import write_json

Rule = Literal["dense", "selected", "recent"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Which keys a token attends: all, or those of ``top_k`` blocks, selected or the most recent ones.

    The first block of the sequence is always among them.
    """

    rule: Rule
    top_k: int = 0
    block_size: int = 64

    @property
    def name(self) -> str:
        return self.rule if self.rule == "dense" else f"{self.rule}, {self.top_k} x {self.block_size}"


@dataclass(frozen=True, slots=True)
class Row:
    """A text read in one setting. The second half is where tokens have the most keys to leave out.

    ``share_of_keys`` that tokens of the second half attend, of those they could see; ``seconds`` of the
    whole prefill, the model's own work and the losses included.
    """

    text: str
    setting: Setting
    perplexity: float
    second_half_perplexity: float
    share_of_keys: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Check:
    """Perplexities of the beginning of a text that must be equal but for rounding."""

    text: str
    num_tokens: int
    models_own: float
    dense: float
    all_blocks: float


@dataclass(slots=True)
class PerplexityResults:
    """``texts``: where each is from, and the SHA-256 of its token ids (int64, little-endian)."""

    machine: dict[str, str]
    command: str
    model: str
    num_tokens: int
    texts: dict[str, dict[str, str]]
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def rows_by_text(self) -> dict[str, list[Row]]:
        """In the order in which they were measured."""
        return {text: [row for row in self.rows if row.text == text] for text in self.texts}

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "PerplexityResults":
        document = json.loads(path.read_text())
        document["checks"] = [Check(**check) for check in document["checks"]]
        document["rows"] = [Row(**{**row, "setting": Setting(**row["setting"])}) for row in document["rows"]]
        return cls(**document)

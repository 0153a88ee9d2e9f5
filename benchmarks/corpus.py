"""Bytes to train on that are on any machine with Python: the sources of its standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Of the files, chosen by a hash of their name, so that a file stays where it is from version to version.
HELD_OUT_SHARE = 0.05
# Between files; no source has it.
SEPARATOR = b"\0"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Both parts uint8 [num_bytes], whole files one after the other; ``sha256`` of both, in that order."""

    training: torch.Tensor
    held_out: torch.Tensor
    num_files: int
    sha256: str


def standard_library() -> Corpus:
    """Every .py file of the standard library, but for what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not name.startswith(("site-packages/", "dist-packages/"))]
    held_out = {name for name in names if _is_held_out(name)}
    parts = [
        b"".join(
            (root / name).read_bytes() + SEPARATOR for name in names if (name in held_out) == is_held_out
        )
        for is_held_out in (False, True)
    ]
    return Corpus(
        *(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts),
        num_files=len(names),
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
    )


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [num_starts, length + 1]: the bytes from each start, and the one after them."""
    return text[starts[:, None] + torch.arange(length + 1)].long()

"""What commands print and write: aligned columns for people, files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.commands.failures import CommandFailed

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns as wide as they need, never cut to the terminal's width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the OSError of a file that cannot be written into CommandFailed."""
    try:
        yield
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}") from error


def format_bytes(count: int) -> str:
    """1536 is "1.5 KiB"."""
    power = 0
    while count >= 1024 ** (power + 1) and power + 1 < len(_UNITS):
        power += 1
    return f"{count / 1024**power:.4g} {_UNITS[power]}"


def format_seconds(seconds: float) -> str:
    """Milliseconds with as many digits as say something."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

"""Files as the command line writes them: all of one or nothing, under whatever its name stands for."""

import errno
import os
import stat
import tempfile
from pathlib import Path
from secrets import token_hex


def check_writable(path: Path) -> None:
    """Raises OSError where ``write_file`` would fail, as far as can be known before there is anything."""
    mode = _mode(path)
    if mode is None or stat.S_ISREG(mode):
        with tempfile.TemporaryFile(dir=_target(path).parent):
            pass
    elif stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def write_file(path: Path, content: bytes) -> None:
    """Replaces a regular file in one step, at the end of links too; a FIFO or a device is written to.

    A new file gets the mode that the umask leaves, one that was there keeps its own. Raises OSError.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        path.write_bytes(content)
        return
    target = _target(path)
    unfinished = target.with_name(f".fsa-{token_hex(8)}")
    try:
        with unfinished.open("xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(content)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """Of what is at the end of links; None: nothing yet."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))

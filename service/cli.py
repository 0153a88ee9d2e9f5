"""The ``fsa`` command: exit code 0 when done, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""

import errno
import os
import signal
import sys
from collections.abc import Sequence

from service.signals import leave_at_once

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of this process, or the one given, and ends the process."""
    # The server, which has requests to answer, takes Ctrl-C over as soon as it is up.
    leave_at_once(signal.SIGINT)
    try:
        from service.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(
            "fsa: the command line is not in the base install; "
            "pip install '.[server]' in the source folder adds it"
        )
    from service.commands.failures import CommandFailed

    try:
        try:
            app(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except CommandFailed as failure:
        print(f"fsa: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except OSError as error:
        # Files that commands write have names, and failures of their own.
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        # Python writes what is left in the buffer at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"fsa: the output cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()

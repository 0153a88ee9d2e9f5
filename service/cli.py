"""The ``fsa`` command: exit code 0 when done, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""

import signal
import sys

from service.signals import leave_at_once


def main() -> None:
    """Runs the command line of this process."""
    # The server, which has requests to answer, takes Ctrl-C over as soon as it is up.
    leave_at_once(signal.SIGINT)
    try:
        from service.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("fsa: the command line is not in the base install; pip install 'fsa-serve[server]'")
    from service.commands.failures import CommandFailed

    try:
        app()
    except CommandFailed as failure:
        print(f"fsa: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    main()

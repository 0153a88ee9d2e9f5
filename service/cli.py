"""The ``fsa`` command: exit code 0 when done, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""

import sys

INTERRUPTED_EXIT_CODE = 130


def main() -> None:
    """Runs the command line of this process."""
    try:
        _run()
    except KeyboardInterrupt:
        # What comes between typer's own handlers, while modules load say, must not end in a traceback.
        sys.exit(INTERRUPTED_EXIT_CODE)


def _run() -> None:
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

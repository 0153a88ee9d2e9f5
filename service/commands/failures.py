"""Failures that a user can act on: one line on standard error instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class CommandFailed(Exception):
    """What went wrong, and what to do about it, in one line."""

    exit_code = 1


class WrongUsage(CommandFailed):
    """The command was called with something that it cannot take."""

    exit_code = 2


@contextmanager
def client_failures(target: str) -> Iterator[None]:
    """Turns what a call to the server at ``target`` can raise into CommandFailed."""
    from service.client import AttentionError, Unavailable

    try:
        yield
    except Unavailable as error:
        if error.reason:
            raise CommandFailed(f"the server at {target} is not available: {error}") from error
        hint = "start one with `fsa serve`, or name another with --target"
        raise CommandFailed(f"no server answers at {target}; {hint} ({error.message})") from error
    except AttentionError as error:
        request = f" (request {error.request_id})" if error.request_id else ""
        raise CommandFailed(f"{error}{request}") from error

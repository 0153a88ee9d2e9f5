"""The server's process: its environment, its signals, its exit code."""

from service.config import Settings


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code of the process."""
    raise NotImplementedError

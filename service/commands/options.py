"""Options that several commands have, and what they refuse."""

from math import isfinite
from typing import Annotated

import typer

from service.commands.failures import WrongUsage

SHORTEST_SECONDS = 0.1


def _checked_target(target: str) -> str:
    if not target:
        raise WrongUsage("--target is empty; it must be host:port, such as 127.0.0.1:50051")
    return target


def _checked_timeout(seconds: float) -> float:
    if not seconds >= 0:
        raise WrongUsage(f"--timeout-seconds is {seconds}; it must be seconds from 0 on, or inf")
    return seconds


def _checked_duration(seconds: float) -> float:
    if not (isfinite(seconds) and seconds >= SHORTEST_SECONDS):
        raise WrongUsage(f"--duration is {seconds}; it must be seconds from {SHORTEST_SECONDS} on")
    return seconds


Target = Annotated[
    str, typer.Option(envvar="FSA_TARGET", callback=_checked_target, help="The server, as host:port.")
]
DEFAULT_TARGET = "127.0.0.1:50051"

TimeoutSeconds = Annotated[float, typer.Option(callback=_checked_timeout, help="Deadline of each request.")]

Duration = Annotated[float, typer.Option(callback=_checked_duration, help="Seconds of each run.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

"""``fsa serve``: run the server."""

from pathlib import Path
from typing import Annotated

import typer

from service.commands import settings


def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0: any free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of /metrics; 0: any free one.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, or a list such as cuda:0,cuda:1.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="auto, triton, cpu or reference.")] = None,
    reflection: Annotated[
        bool | None, typer.Option("--reflection/--no-reflection", help="Serve gRPC reflection.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="json, or text for people.")] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Every setting is also an environment variable, FSA_<NAME>; `fsa config` lists them all. A flag wins
    over the environment, and the environment over the file.
    """
    chosen = settings.load(locals())
    from service.server import run

    raise typer.Exit(run(chosen))

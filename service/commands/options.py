"""Options that several commands have."""

from typing import Annotated

import typer

Target = Annotated[str, typer.Option(envvar="FSA_TARGET", help="The server, as host:port.")]
DEFAULT_TARGET = "127.0.0.1:50051"

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

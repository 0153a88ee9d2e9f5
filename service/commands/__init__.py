"""The commands of ``fsa``. Each imports what it works with when it runs, so that --help stays quick."""

import typer

from service.commands.attend import attend
from service.commands.bench import bench
from service.commands.config import config
from service.commands.info import info
from service.commands.serve import serve
from service.commands.tune import tune

app = typer.Typer(
    help="Attention as a service: run the server, look at it, send it work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (serve, config, info, attend, bench, tune):
    app.command()(command)

"""``fsa config``: what the server would run with."""

import json
from pathlib import Path
from typing import Annotated

import typer

from service.commands import settings
from service.commands.options import Json
from service.commands.output import print_table


def config(
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    as_json: Json = False,
) -> None:
    """Print every setting that `fsa serve` would run with here, and where it is from."""
    flags = {"config": config}
    chosen = settings.load(flags)
    values = chosen.model_dump(mode="json")
    sources = settings.sources(chosen, flags)
    if as_json:
        print(
            json.dumps({name: {"value": values[name], "source": sources[name]} for name in values}, indent=2)
        )
    else:
        shown = {name: "" if value is None else str(value) for name, value in values.items()}
        print_table([("SETTING", "VALUE", "SOURCE"), *((name, shown[name], sources[name]) for name in shown)])

"""The server's settings as the command line reads them, with errors for people."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.commands.failures import WrongUsage

if TYPE_CHECKING:
    from service.config import Settings


def load(flags: Mapping[str, Any]) -> "Settings":
    """The settings from flags (None: not given), environment and file. Raises WrongUsage."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from service.config import Settings

    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise WrongUsage("; ".join(_sentence(dict(detail)) for detail in error.errors())) from error
    except (SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise WrongUsage(f"the settings cannot be read: {error}") from error


def sources(settings: "Settings", flags: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting that ``load(flags)`` gave is from: "flag", "environment", "file" or "default"."""
    environment = {name.lower() for name in os.environ}
    in_file = {name.lower() for name in _names_in(settings.config)} if settings.config else set()
    found = {}
    for name in type(settings).model_fields:
        if flags.get(name) is not None:
            found[name] = "flag"
        elif f"fsa_{name}" in environment:
            found[name] = "environment"
        else:
            found[name] = "file" if name in in_file else "default"
    return found


def _names_in(file: Path) -> Iterable[str]:
    with file.open("rb") as opened:
        return tomllib.load(opened)


def _sentence(detail: Mapping[str, Any]) -> str:
    problem = detail["msg"].removeprefix("Value error, ")
    name = ".".join(str(part) for part in detail["loc"])
    return f"{name}: {problem}, not {detail['input']!r}" if name else problem

"""``fsa info``: what a server is, or which path a shape takes through the kernels."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.failures import WrongUsage, client_failures
from service.commands.options import DEFAULT_TARGET, Json, Target
from service.commands.output import format_bytes, print_table
from service.commands.paths import show_path
from service.commands.shapes import SHAPE_METAVAR, CallShape, Tokens, parse_tokens

if TYPE_CHECKING:
    from service.client import Device, PatternLimits, ServerInfo


def info(
    target: Target = DEFAULT_TARGET,
    shape: Annotated[
        str | None,
        typer.Option(metavar=SHAPE_METAVAR, help="Say which path this shape takes; asks no server."),
    ] = None,
    tokens: Tokens = "8192,65536",
    device: Annotated[
        str | None, typer.Option(help="With --shape: on this GPU, by the driver's name; else the one here.")
    ] = None,
    path: Annotated[str, typer.Option(help="With --shape: what is asked for.")] = "auto",
    as_json: Json = False,
) -> None:
    """Print what the server is, what it takes, and its limits.

    With --shape, print instead how selected attention of that shape runs on a GPU and why, as the tuning
    tables that are found here say (FSA_TUNING_FILE, the user's, the shipped ones).
    """
    if shape is not None:
        show_path(CallShape.parse(shape), parse_tokens(tokens), device, path, as_json)
        return
    if device is not None or path != "auto":
        raise WrongUsage("--device and --path say something about a --shape; there is none")
    from service.client import AttentionClient

    with client_failures(target), AttentionClient(target, timeout_seconds=10, retry=False) as client:
        health, server = client.health(), client.server_info()
    if as_json:
        print(json.dumps({"health": health, **dataclasses.asdict(server)}, indent=2))
    else:
        print_table([("health", health), *_rows(server)])


def _rows(server: "ServerInfo") -> list[tuple[str, str]]:
    server_limits = dataclasses.asdict(server.limits)
    return [
        ("version", f"{server.version} (protocol {server.protocol})"),
        *((f"device {device.index}", _device(device)) for device in server.devices),
        ("dtypes", ", ".join(server.dtypes)),
        ("patterns", ", ".join(server.patterns)),
        *((f"pattern {limits.name}", _pattern(limits)) for limits in server.pattern_limits),
        ("kernels", ", ".join(server.kernels)),
        *((f"{name} version", version) for name, version in sorted(server.versions.items())),
        *((name, _limit(name, value)) for name, value in server_limits.items()),
    ]


def _device(device: "Device") -> str:
    state = "up" if device.up else "down"
    return f"{device.name} ({device.kind}), {format_bytes(device.memory_bytes)}, {state}"


def _pattern(limits: "PatternLimits") -> str:
    facts = [f"at most {limits.max_slots} blocks a row" if limits.max_slots else "every block"]
    if limits.shared_rows:
        facts.append("a row a query or a block of queries")
    if limits.causal_only:
        facts.append("causal only")
    if limits.max_kernel_size:
        facts.append(f"windows of at most {limits.max_kernel_size} keys")
    return ", ".join(facts)


def _limit(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    if value == 0:
        return "none"
    return format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)

"""``fsa attend``: one request from a safetensors file, its answer into another."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.failures import CommandFailed, WrongUsage, client_failures
from service.commands.options import DEFAULT_TARGET, Json, Target, TimeoutSeconds
from service.commands.output import format_seconds, print_table, writing
from service.files import check_writable, write_file

if TYPE_CHECKING:
    from service.client import AttendResult, Pattern


def attend(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="safetensors file with the request.")],
    destination: Annotated[Path, typer.Argument(metavar="OUTPUT", help="safetensors file for the answer.")],
    target: Target = DEFAULT_TARGET,
    dense: Annotated[bool, typer.Option("--dense", help="Attend to every key.")] = False,
    block_size: Annotated[int | None, typer.Option(help="Keys in a block.")] = None,
    query_block_size: Annotated[int | None, typer.Option(help="Queries that share a row of indices.")] = None,
    softmax_scale: Annotated[float | None, typer.Option(help="1/sqrt(head_dim) if not given.")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--no-causal", help="Causal if not given.")] = None,
    timeout_seconds: TimeoutSeconds = 60.0,
    as_json: Json = False,
) -> None:
    """Compute the attention of one file of tensors.

    INPUT holds q, k, v [tokens, heads, dim], block_indices [heads, tokens, slots] unless --dense, and
    cu_seqlens_q and cu_seqlens_k for packed sequences. block_size, query_block_size, softmax_scale and
    causal may stand in the file's metadata; flags win. OUTPUT gets out and lse.
    """
    from service.client import AttentionClient

    with writing(destination):
        check_writable(destination)
    tensors, metadata = _read(source)
    given = {
        "block_size": block_size,
        "query_block_size": query_block_size,
        "softmax_scale": softmax_scale,
        "causal": causal,
    }
    parameters = _parameters(source, metadata) | {
        name: value for name, value in given.items() if value is not None
    }
    q, k, v = (_tensor(source, tensors, name) for name in ("q", "k", "v"))
    pattern = _pattern(source, tensors, parameters, dense)
    with client_failures(target), AttentionClient(target, timeout_seconds=timeout_seconds) as client:
        client.health(timeout_seconds=10)  # a server that is not there is said at once, not at the deadline
        try:
            answer = client.attend(
                q,
                k,
                v,
                pattern,
                cu_seqlens_q=tensors.get("cu_seqlens_q"),
                cu_seqlens_k=tensors.get("cu_seqlens_k"),
                softmax_scale=parameters.get("softmax_scale"),
                causal=parameters.get("causal", True),
                return_lse=True,
            )
        except (TypeError, ValueError) as error:
            raise CommandFailed(f"{source}: {error}") from error
    _write(destination, answer)
    _report(answer, as_json)


def _read(source: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CommandFailed(f"{source} cannot be read as safetensors: {error}") from error
    except (AttributeError, TypeError) as error:
        # How safetensors says that numpy has no such dtype.
        raise CommandFailed(f"{source} has a tensor of a dtype that numpy has not: {error}") from error


def _parameters(source: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    parsers: dict[str, Callable[[str], Any]] = {
        "block_size": int,
        "query_block_size": int,
        "softmax_scale": float,
        "causal": _parse_bool,
    }
    parameters = {}
    for name, parse in parsers.items():
        if name not in metadata:
            continue
        try:
            parameters[name] = parse(metadata[name])
        except ValueError as error:
            raise CommandFailed(f"{source}: the metadata's {name} is {metadata[name]!r}") from error
    return parameters


def _parse_bool(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _tensor(source: Path, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        found = ", ".join(sorted(tensors)) or "no tensors"
        raise CommandFailed(f"{source} has no tensor {name!r}; it has {found}")
    return tensors[name]


def _pattern(
    source: Path, tensors: Mapping[str, Any], parameters: Mapping[str, Any], dense: bool
) -> "Pattern":
    from service.client import BlockIndices, Dense

    if dense:
        return Dense()
    if "block_indices" not in tensors:
        raise CommandFailed(
            f"{source} has no tensor 'block_indices'; add it, or attend to all keys with --dense"
        )
    if "block_size" not in parameters:
        raise WrongUsage(f"give --block-size, or put block_size into the metadata of {source}")
    indices = tensors["block_indices"]
    return BlockIndices(indices, parameters["block_size"], parameters.get("query_block_size", 1))


def _write(destination: Path, answer: "AttendResult[Any]") -> None:
    from safetensors.numpy import save

    tensors: dict[str, Any] = {"out": answer.out, "lse": answer.lse}
    content = save(tensors, metadata={"request_id": answer.request_id})
    with writing(destination):
        write_file(destination, content)


def _report(answer: "AttendResult[Any]", as_json: bool) -> None:
    timings = dataclasses.asdict(answer.timings)
    if as_json:
        print(json.dumps({"request_id": answer.request_id, "timings": timings}, indent=2))
        return
    seconds = {name: value for name, value in timings.items() if name.endswith("_seconds")}
    rows = [(name.removesuffix("_seconds"), format_seconds(value)) for name, value in seconds.items()]
    print_table([("request", answer.request_id), *rows])

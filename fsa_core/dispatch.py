"""Which path a problem takes through the Triton kernels and with which sizes, before anything runs."""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2

import torch

from fsa_core.plan import KV_MAJOR, PATHS, QUERY_TILE, takes
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim
from fsa_core.tiles import Tuning, default_tuning, row_tile_tokens
from fsa_core.tuning_table import Entry, Shape, table_for

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Choice:
    """Paths of ``plan.PATHS`` with their measured sizes; ``reason`` is for people."""

    path: str
    tuning: Tuning
    reason: str
    backward_path: str


@dataclass(frozen=True, slots=True)
class _Nearest:
    entry: Entry
    reason: str


@lru_cache(maxsize=1024)
def choose(problem: Problem, device_name: str, path: str = AUTO) -> Choice:
    """The path and the sizes for selected attention on a device, from its table or by default.

    The nearest measured shape counts, among those with tiles as wide and elements as large. Lengths do not:
    a packed call knows only the sum of its sequences' lengths, and an answer must not depend on company.
    (With tens of millions of keys, query tiles run out of numbers for blocks, and the call goes KV-major.)
    Queries that share a row of indices are attended by query tiles if they fill these, whatever was measured
    of rows that each token has for itself.

    Args:
        device_name: as the driver names it, or "cpu".
        path: "auto", or the one of ``plan.PATHS`` to take. A named path is kept, for gradients too, with the
            sizes of the shape; ``plan_forward`` refuses it where it cannot take the problem.

    Raises:
        ValueError: the path is unknown.
        TuningError: the device's table is not valid.
    """
    check_path(path)
    nearest = _nearest(Shape.of(problem), device_name)
    if isinstance(nearest, str):
        best, tuning, reason, backward = KV_MAJOR, default_tuning(problem), nearest, None
    else:
        entry, reason = nearest.entry, nearest.reason
        best, tuning, backward = entry.path, entry.tuning, entry.backward_path
    if path != AUTO:
        return Choice(path, tuning, f"asked for; sizes: {reason}", path)
    if row_tile_tokens(problem, tuning.shared):
        reason = f"{problem.query_block_size} queries share a row; sizes: {reason}"
        best, backward = QUERY_TILE, QUERY_TILE
    if not takes(problem, best):
        return Choice(KV_MAJOR, tuning, f"too many keys for {best}; sizes: {reason}", KV_MAJOR)
    backward = backward or best
    return Choice(best, tuning, reason, backward if takes(problem, backward) else KV_MAJOR)


def check_path(path: str) -> None:
    """Raises ValueError unless ``path`` is "auto" or one of ``plan.PATHS``."""
    if path not in (AUTO, *PATHS):
        raise ValueError(f"path is {path!r}: expected one of {', '.join((AUTO, *PATHS))}")


@cache
def device_name(device: torch.device) -> str:
    """As the driver names it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _nearest(shape: Shape, device_name: str) -> _Nearest | str:
    """The entry that a shape goes by, or why there is none."""
    table = table_for(device_name)
    if table is None:
        return f"no table for {device_name}: defaults"
    fitting = [entry for entry in table.entries if _tile_of(entry.shape) == _tile_of(shape)]
    if not fitting:
        return f"table {table.device} has no entry with such tiles: defaults"
    entry = min(fitting, key=lambda entry: _distance(entry.shape, shape))
    how = "entry" if entry.shape == shape else "nearest entry"
    return _Nearest(entry, f"table {table.device}, {how} {entry.shape} ({table.source})")


def _tile_of(shape: Shape) -> tuple[int, int, int]:
    """What decides how much of a multiprocessor a tile takes, and so cannot be carried over."""
    return padded_dim(shape.head_dim), padded_dim(shape.value_dim), shape.dtype_bytes


def _distance(measured: Shape, shape: Shape) -> tuple[float, ...]:
    """In octaves; between two that are as near, the larger sizes count."""
    sizes = [(x.heads_per_pair, x.block_size, x.max_slots) for x in (measured, shape)]
    octaves = sum(abs(log2(a / b)) for a, b in zip(*sizes, strict=True))
    dims = abs(measured.head_dim - shape.head_dim) + abs(measured.value_dim - shape.value_dim)
    return octaves, dims, *(-size for size in sizes[0])

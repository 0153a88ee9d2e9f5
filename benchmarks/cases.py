"""The registry: every case that is measured, in named suites."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch

from benchmarks.indices import Kind

Stage = Literal["forward", "backward", "index"]
# Of the device, or of the Python code that enqueues the work.
Clock = Literal["device", "host"]
# Selected attention of given blocks, or of the operator: compressed attention and selection; these and
# attention to the selected blocks, added up; all three branches under gates; selected attention of one token.
Part = Literal["selected", "selection", "operator", "windowed", "decode"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STAGES: tuple[Stage, ...] = ("forward", "backward")
DRAWN_KINDS: tuple[Kind, ...] = ("random", "real")
TARGET_TOKENS = (8192, 32768, 65536)
TARGET_GROUP_SIZES = (1, 2, 4, 8, 16)
OPERATOR_GROUP_SIZES = (1, 4, 16)
# Layers of a model that decodes, whose steps are one CUDA graph: a layer alone would be timed with its start.
DECODED_LAYERS = 16
# Where dense attention stops being faster is looked for between these.
BREAK_EVEN_TOKENS = (2048, 4096, 8192, 12288, 16384, 32768, 65536)
# Beyond these the peers' memory grows past a GPU's, and dense attention takes seconds.
MOST_PEER_TOKENS = 65536


@dataclass(frozen=True, slots=True)
class Case:
    """One causal sequence, as many queries as keys. The backward stage is timed without its forward pass."""

    num_tokens: int
    group_size: int
    kind: Kind
    stage: Stage = "forward"
    clock: Clock = "device"
    num_kv_heads: int = 4
    head_dim: int = 128
    value_dim: int = 128
    block_size: int = 64
    num_slots: int = 16
    dtype: str = "bfloat16"
    part: Part = "selected"
    # Sequences, of the part "decode".
    batch: int = 1
    # Consecutive tokens that share a row of indices, of the part "selected".
    query_block_size: int = 1

    @property
    def name(self) -> str:
        if self.part != "selected":
            return f"{self.stage}-n{self.num_tokens}-g{self.group_size}-{self.layout}"
        clock = "host-" if self.clock == "host" else ""
        return f"{clock}{self.stage}-{self.kind}-n{self.num_tokens}-g{self.group_size}-{self.layout}"

    @property
    def calls(self) -> int:
        """That a run makes; what is reported is the time of one."""
        return DECODED_LAYERS if self.part == "decode" else 1

    @property
    def keys_of_row(self) -> int:
        """That a row of indices attends with all its slots."""
        return self.num_slots * self.block_size

    @property
    def layout(self) -> str:
        """What is the same along a curve over lengths."""
        dims = f"d{self.head_dim}" + (f"v{self.value_dim}" if self.value_dim != self.head_dim else "")
        sizes = f"h{self.num_kv_heads}-{dims}-{self.block_size}x{self.num_slots}"
        if self.part == "selected":
            return sizes + (f"-q{self.query_block_size}" if self.query_block_size > 1 else "")
        return f"{self.part}-" + (f"b{self.batch}-" if self.part == "decode" else "") + sizes


def _targets() -> list[Case]:
    """What the library's goals are stated for."""
    grid = list(product(STAGES, TARGET_TOKENS, DRAWN_KINDS))
    cases = [Case(n, g, kind, stage) for stage, n, kind in grid for g in TARGET_GROUP_SIZES]
    eight_heads = [Case(n, 4, kind, stage, num_kv_heads=8) for stage, n, kind in grid]
    return cases + [replace(case, block_size=128, num_slots=8) for case in cases] + eight_heads


def _lengths() -> list[Case]:
    """8K to 1M tokens: time grows linearly and memory does not grow."""
    lengths = [1 << power for power in range(13, 21)]
    return [Case(n, g, "real", stage) for stage, g, n in product(STAGES, (1, 4), lengths)]


def _adversarial() -> list[Case]:
    """Every token chooses the same block: what is popular must cost no more than what is not."""
    return [Case(n, g, "same", stage) for stage, n, g in product(STAGES, (8192, 65536), (1, 4, 16))]


def _patterns() -> list[Case]:
    """Rows of indices that a block of queries shares, beside dense attention, of all keys and of as many."""
    grid = product((64, 128), TARGET_TOKENS, OPERATOR_GROUP_SIZES)
    return [Case(n, g, "random", query_block_size=shared) for shared, n, g in grid]


def _index() -> list[Case]:
    """The inversion of block_indices alone, for 4 heads."""
    return [Case(n, 4, kind, "index") for n, kind in product((8192, 65536), DRAWN_KINDS)]


def _host() -> list[Case]:
    """Problems that are small for the device: what is left is Python."""
    return [Case(256, g, "random", stage, "host") for stage, g in product(STAGES, TARGET_GROUP_SIZES)]


def _operator() -> list[Case]:
    """Native Sparse Attention: its stages, without and with the window, by length, and a step of decode."""
    grid = list(product(TARGET_TOKENS, OPERATOR_GROUP_SIZES))
    windowed = [*product((4, 16), BREAK_EVEN_TOKENS), (1, 1 << 16), (4, 1 << 17), (4, 1 << 18)]
    return [
        *(Case(n, g, "random", stage, part="operator") for stage in STAGES for n, g in grid),
        *(Case(n, g, "random", part="selection") for n, g in grid),
        *(Case(n, g, "random", part="windowed") for g, n in windowed),
        *(Case(1 << 15, 4, "random", part="decode", batch=batch) for batch in (1, 16, 64)),
    ]


def _cpu() -> list[Case]:
    """For the CPU backend, beside dense attention with a mask and without."""
    shape = {"num_kv_heads": 3, "head_dim": 64, "value_dim": 64, "dtype": "float32"}
    return [Case(n, 3, kind, **shape) for n, kind in product((8192, 32768), DRAWN_KINDS)]


def _smoke() -> list[Case]:
    """Seconds, on any machine: that the benchmarks themselves work."""
    shape = {"num_kv_heads": 2, "head_dim": 32, "value_dim": 16, "block_size": 16, "num_slots": 4}
    kinds: tuple[Kind, ...] = ("random", "real", "same")
    selected = [Case(384, 2, kind, stage, dtype="float32", **shape) for stage, kind in product(STAGES, kinds)]
    selected += [
        Case(384, 2, "random", stage, dtype="float32", query_block_size=32, **shape) for stage in STAGES
    ]
    parts: tuple[tuple[Part, Stage], ...] = (
        ("selection", "forward"),
        ("operator", "forward"),
        ("operator", "backward"),
        ("windowed", "forward"),
        ("decode", "forward"),
    )
    return selected + [
        Case(384, 2, "random", stage, dtype="float32", part=part, **shape) for part, stage in parts
    ]


SUITES = {
    "targets": _targets,
    "lengths": _lengths,
    "adversarial": _adversarial,
    "patterns": _patterns,
    "index": _index,
    "host": _host,
    "operator": _operator,
    "cpu": _cpu,
    "smoke": _smoke,
}


def suite(name: str) -> list[Case]:
    return SUITES[name]()


def as_recorded(cases: Iterable[Case], num_tokens: int, num_slots: int) -> list[Case]:
    """The cases of ``real`` indices that so many recorded tokens, with blocks of 64, can stand in for."""
    return [
        replace(case, kind="recorded")
        for case in cases
        if case.kind == "real"
        and case.num_tokens <= num_tokens
        and (case.block_size, case.num_slots) == (64, num_slots)
    ]

"""Every kernel compiled for Hopper, on a machine without a GPU: ``python -m tests.hopper_grid``.

The launches of real calls, forward and backward, are caught and compiled instead of run, so what is compiled
is what the plans choose. A line a kernel: registers, bytes a thread spills, shared memory; exits 1 if one
does not compile, is wrong as it is compiled (see tests.machine_code) or needs more shared memory than there
is. TRITON_INTERPRET must not be set.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from fsa_core.kernels import decode, hopper
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.compressed import (
    compressed_attention_forward,
    row_shares,
    window_attention_forward,
)
from fsa_core.kernels.decode import paged_selected_attention_forward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.kernels.interval_gradients import interval_attention_backward
from fsa_core.kernels.means import means, spread
from fsa_core.kernels.row_expansion import expand_rows
from fsa_core.kernels.selection import Blocks, select_blocks_forward, takes
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.stages import kernel_sizes, window_sizes
from fsa_core.nsa.validation import Call
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, MIXED, PATHS, QUERY_TILE, TOKEN_MAJOR
from tests.fsa_core.conftest import _make_case as make_case
from tests.fsa_core.conftest import _make_paged as make_paged
from tests.fsa_core.nsa.conftest import _make_call as make_call
from tests.machine_code import arrivals_before_all_have_met, unwritten_uniform_registers

HOPPER = GPUTarget("cuda", 90, 32)
# Of one program, on compute capability 9.0 (CUDA C++ Programming Guide, table of technical specifications).
SHARED_BYTES = 227 * 1024
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
# The widest heads in every dtype, whole and odd ones; the largest groups and blocks, the smallest of both.
EXTREMES: tuple[dict[str, Any], ...] = (
    {"head_dim": 256, "dtype": torch.float32, "block_size": 64, "group_size": 4},
    {"head_dim": 256, "dtype": torch.bfloat16, "block_size": 256, "group_size": 96, "num_slots": 16},
    {"head_dim": 80, "value_dim": 16, "dtype": torch.float16, "block_size": 16, "group_size": 1},
    # Where v is narrower than k, ptxas was wrong.
    {"head_dim": 128, "value_dim": 32, "dtype": torch.bfloat16, "block_size": 64, "group_size": 4},
    # What kernels for Hopper alone take.
    {"head_dim": 128, "dtype": torch.bfloat16, "block_size": 64, "group_size": 16},
    {"head_dim": 64, "dtype": torch.bfloat16, "block_size": 64, "group_size": 1},
    # What takes them the most shared memory.
    {"head_dim": 128, "dtype": torch.bfloat16, "block_size": 128, "group_size": 4},
    {"head_dim": 128, "value_dim": 64, "dtype": torch.float16, "block_size": 128, "group_size": 12},
)
WINDOWS: tuple[dict[str, Any], ...] = (
    {"head_dim": 128, "value_dim": 128, "dtype": torch.bfloat16, "config": NSAConfig(), "group_size": 4},
    {"head_dim": 128, "value_dim": 32, "dtype": torch.bfloat16, "config": NSAConfig(), "group_size": 2},
    # What the kernel for Hopper alone takes beside the first: rows that are not there, heads in parts.
    {"head_dim": 64, "value_dim": 128, "dtype": torch.float16, "config": NSAConfig(), "group_size": 100},
    {"head_dim": 256, "value_dim": 256, "dtype": torch.float32, "config": NSAConfig(), "group_size": 1},
    {
        "head_dim": 80, "value_dim": 192, "dtype": torch.float16, "group_size": 96,
        "config": NSAConfig(kernel_size=64, stride=64, block_size=256, top_k=256, top_p=0.9),
    },
)  # fmt: skip
DECODES: tuple[dict[str, Any], ...] = (
    {"head_dim": 128, "dtype": torch.bfloat16, "block_size": 64, "group_size": 4, "num_slots": 16},
    # Products of 64 rows, where v is narrower than k, and a merge of as many splits as there may be.
    {
        "head_dim": 128, "value_dim": 32, "dtype": torch.bfloat16, "block_size": 64, "group_size": 96,
        "num_slots": 4096,
    },
    {"head_dim": 256, "dtype": torch.float32, "block_size": 256, "group_size": 96, "num_slots": 16},
    {
        "head_dim": 80, "value_dim": 256, "dtype": torch.float16, "block_size": 16, "group_size": 3,
        "num_slots": 40,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs of a multiprocessor; registers and spilled bytes are a thread's."""

    name: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def fits(self) -> bool:
        return not self.error and self.shared_bytes <= SHARED_BYTES

    def __str__(self) -> str:
        if self.error:
            return f"{self.name}: {self.error}"
        return (
            f"{self.name}: {self.registers} registers, {self.spilled_bytes} bytes spilled, "
            f"{self.shared_bytes} bytes shared"
        )


class Launches:
    """Compiles, once for each set of constants and types, what would be launched."""

    def __init__(self) -> None:
        self.compiled: dict[Any, Compiled] = {}

    def catch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if 0 in (grid if isinstance(grid, tuple) else (grid,)):
            raise ValueError(f"{kernel.fn.__name__}: CUDA launches no empty grid, {grid}")
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in constants else _type(values[name]) for name in values}
        key = (kernel.fn.__name__, *constants.items(), *signature.items(), *options.items())
        if key not in self.compiled:
            self.compiled[key] = _compile(kernel, signature, constants, options)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _compile(
    kernel: JITFunction, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Compiled:
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name, x in signature.items() if x[0] == "*"},
    )
    name = kernel.fn.__name__
    try:
        compiled = triton.compile(source, target=HOPPER, options=options)
    except PTXASError as error:
        return Compiled(name, error=next(x for x in str(error).splitlines() if "fatal" in x))
    told = _told(compiled.asm["cubin"])
    if wrong := unwritten_uniform_registers(told):
        return Compiled(name, error=f"{wrong[0]}, which nothing has written")
    if early := arrivals_before_all_have_met(compiled.asm["ptx"]):
        return Compiled(name, error=f"{early[0]}, by which its group need not have met")
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return Compiled(name, int(numbers["REG"]), int(numbers["STACK"]), compiled.metadata.shared)


def _told(cubin: bytes) -> str:
    """What cuobjdump says of the machine code: what it needs, and the code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def caught() -> Iterator[Launches]:
    """What is launched inside is compiled instead."""
    launches, run = Launches(), JITFunction.run
    runs_on, multiprocessors = hopper.runs_on, decode.multiprocessors
    min_bytes = hopper.MIN_FORWARD_BYTES, hopper.MIN_GRADIENT_BYTES
    hopper.MIN_FORWARD_BYTES = hopper.MIN_GRADIENT_BYTES = 0
    JITFunction.run = lambda kernel, *args, **rest: launches.catch(kernel, *args, **rest)
    try:
        yield launches
    finally:
        JITFunction.run = run
        hopper.runs_on, decode.multiprocessors = runs_on, multiprocessors
        hopper.MIN_FORWARD_BYTES, hopper.MIN_GRADIENT_BYTES = min_bytes


def compile_shape(
    shape: dict[str, Any], paths: tuple[str, ...], limits_bytes: tuple[int, ...]
) -> Iterator[Compiled]:
    """The kernels of one shape: forward on ``paths``, backward in one pass or, within 1 byte, in two.

    And forward where queries share a row of indices.
    """
    case = make_case(torch.device("cpu"), q_lens=(40, 5), num_kv_heads=2, **shape)
    with caught() as launches:
        # What is for every GPU, and what is for Hopper alone.
        for path, limit_bytes, is_hopper in product(paths, limits_bytes, (False, True)):
            hopper.runs_on = lambda _device, is_hopper=is_hopper: is_hopper
            answer = selected_attention_forward(case.problem, *case.tensors, path=path)
            given = (*answer, *case.output_gradients())
            options = {"path": path, "workspace_limit_bytes": limit_bytes}
            selected_attention_backward(case.problem, *case.tensors, *given, **options)
        # In least memory tiles make delta, whatever the limits above are.
        options = {"path": QUERY_TILE, "workspace_limit_bytes": 1}
        hopper.runs_on = lambda _device: True
        selected_attention_backward(case.problem, *case.tensors, *given, **options)
        sharing = replace(case.problem, query_block_size=64)
        starts = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
        sizes = {"block_size": sharing.block_size, "causal": True, "num_q_tokens": sharing.num_q_tokens}
        expand_rows(case.block_indices, query_block_size=64, **sizes, **starts)
        selected_attention_forward(sharing, *case.tensors, path=QUERY_TILE)
    yield from launches.compiled.values()


def compile_windows(shape: dict[str, Any]) -> Iterator[Compiled]:
    """Means, compressed and sliding-window attention with their gradients, and selection of one shape."""
    call = make_call(torch.device("cpu"), q_lens=(300, 40), num_kv_heads=2, **shape)
    config = call.config
    starts = (call.cu_seqlens_q, call.cu_seqlens_k, tuple(call.cu_seqlens_k.tolist()))
    checked = Call(config, *starts, call.softmax_scale, DEFAULT_WORKSPACE_BYTES)
    sizes = kernel_sizes(checked, call.q, call.k_cmp, call.v_cmp)
    blocks = Blocks(config.block_size, config.top_k, config.num_first_blocks, config.num_local_blocks)
    assert takes(*sizes, blocks)
    over_windows, over_keys = (call.q, call.k_cmp, call.v_cmp), (call.q, call.k, call.v)
    key_sizes = window_sizes(checked, *over_keys)
    with caught() as launches:
        spread(
            means(call.k[None], config.kernel_size, config.stride),
            len(call.k),
            config.kernel_size,
            config.stride,
        )
        hopper.runs_on = lambda _device: True
        compressed_attention_forward(*sizes, *over_windows)
        hopper.runs_on = lambda _device: False
        out, lse, shares = compressed_attention_forward(*sizes, *over_windows)
        row_shares(*sizes, call.q, call.k_cmp)
        for is_hopper in (False, True):
            hopper.runs_on = lambda _device, is_hopper=is_hopper: is_hopper
            select_blocks_forward(
                *sizes, blocks, call.q, call.k_cmp, shares, with_importance=config.has_budget
            )
            window_attention_forward(*key_sizes, *over_keys)
        for is_hopper, walked in product((False, True), ((*sizes, *over_windows), (*key_sizes, *over_keys))):
            hopper.runs_on = lambda _device, is_hopper=is_hopper: is_hopper
            interval_attention_backward(
                *walked, out, lse, out, lse, workspace_limit_bytes=DEFAULT_WORKSPACE_BYTES
            )
    yield from launches.compiled.values()


def compile_decode(shape: dict[str, Any]) -> Iterator[Compiled]:
    """A step of one query a sequence, and one of any number, over a paged cache."""
    page_size = 2 * shape["block_size"]
    paged = make_paged(torch.device("cpu"), page_size=page_size, k_lens=(300, 40), **shape)
    *tensors, starts = paged.tensors.values()
    with caught() as launches:
        # A program takes all splits of a row, or one.
        for count in (0, 1 << 30):
            decode.multiprocessors = lambda _device, count=count: count
            paged_selected_attention_forward(paged.case.problem, *tensors, None)
        paged_selected_attention_forward(paged.case.problem, *tensors, starts)
    yield from launches.compiled.values()


def every_shape() -> Iterator[dict[str, Any]]:
    for dtype, head_dim in product(
        (torch.bfloat16, torch.float16, torch.float32), (16, 32, 64, 80, 128, 256)
    ):
        for block_size in (16, 32, 64, 128, 256):
            yield {"dtype": dtype, "head_dim": head_dim, "block_size": block_size, "group_size": 4}
    for group_size, index_heads in ((1, 2), (3, 6), (16, 1), (32, 2), (128, 2)):
        yield {
            "dtype": torch.bfloat16, "head_dim": 128, "block_size": 64,
            "group_size": group_size, "index_heads": index_heads,
        }  # fmt: skip
    for head_dim, value_dim in ((192, 128), (16, 256), (256, 16)):
        yield {"dtype": torch.bfloat16, "head_dim": head_dim, "value_dim": value_dim, "block_size": 64}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("selected", "windows", "decode"), help="these kernels")
    parser.add_argument("--all", action="store_true", help="every dtype, head dim, block size and path")
    options = parser.parse_args()
    fit = True
    # These two have the kernels of the others, and one pass the larger ones of the gradients.
    shapes: Iterable[dict[str, Any]] = EXTREMES
    paths, limits_bytes = (MIXED, TOKEN_MAJOR), (DEFAULT_WORKSPACE_BYTES,)
    if options.all:
        shapes, paths, limits_bytes = every_shape(), PATHS, (DEFAULT_WORKSPACE_BYTES, 1)
    compiled = {
        "selected": [(shape, compile_shape(shape, paths, limits_bytes)) for shape in shapes],
        "windows": [(shape, compile_windows(shape)) for shape in WINDOWS],
        "decode": [(shape, compile_decode(shape)) for shape in DECODES],
    }
    for shape, kernels in chain.from_iterable(
        found for name, found in compiled.items() if options.only in (None, name)
    ):
        named = " ".join(f"{name}={str(x).removeprefix('torch.')}" for name, x in shape.items())
        for kernel in kernels:
            fit &= kernel.fits
            print(named, kernel, flush=True)
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())

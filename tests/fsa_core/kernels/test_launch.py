"""Launches that remember the compiled kernel, against Triton's own.

Without a GPU Triton compiles all the same, in a process without its interpreter; only its driver is stood in
for, by one that writes launches down.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fsa_core.api import selected_attention
from fsa_core.kernels.launch import BoundKernel, Kernel, kernel
from fsa_core.plan import PATHS

compiles = pytest.mark.skipif(
    knobs.runtime.interpret, reason="runs in a process without Triton's interpreter"
)
launches = pytest.mark.skipif("config.getoption('--device') != 'cuda'", reason="launches on a GPU")
GRID = (3, 2)


def nothing(a_ptr, b_ptr, scale, count, offset, WIDTH: tl.constexpr, FLAG: tl.constexpr = True):
    pass


def write(out_ptr, number, WIDTH: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, WIDTH), number)


@dataclass
class Driver:
    """Launches nothing: ``launches`` are what was compiled for what, where it went, and its arguments."""

    device: int = 90
    stream: int = 7
    launches: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), (binary, device), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None) -> int:
        return self.stream + (self.device if device is None else device)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments) -> None:
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            compiled = (source.signature, source.attrs, source.constants, packed)
            self.launches.append((compiled, x, y, z, stream, function, values))
            if enter_hook is not None:
                enter_hook(metadata)

        return launch


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The driver that Triton takes for the machine's."""
    # What another test's driver compiled would be launched by that one. Of a weak reference to what is gone,
    # nothing but its own type may be asked.
    for known in [x for x in gc.get_objects() if type(x) is BoundKernel]:
        known._remembered.clear()
        known._jitted.device_caches.clear()
    stand_in = Driver()
    monkeypatch.setattr(driver, "_active", stand_in)
    return stand_in


@pytest.fixture
def ours(written: Driver) -> Kernel:
    return kernel(nothing)


@pytest.fixture
def theirs(written: Driver) -> Any:
    return triton.jit(nothing, do_not_specialize=["scale", "count", "offset"])


@pytest.fixture
def through_triton(ours: Kernel) -> list[None]:
    """An entry for each launch of ``ours`` that goes through Triton."""
    runs: list[None] = []
    run = ours.jitted.run

    def counted(*args: Any, **rest: Any) -> Any:
        runs.append(None)
        return run(*args, **rest)

    ours.jitted.run = counted
    return runs


def operands(dtype: torch.dtype = torch.float16, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, dtype=dtype)[start:], torch.zeros(64, dtype=torch.int32)


def test_what_compiles_in_a_process_without_the_interpreter() -> None:
    if not knobs.runtime.interpret:
        pytest.skip("this process compiles")
    files = [__file__, str(Path(__file__).with_name("test_replay.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    told = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr


NUMBERS = (0, 1, 16, 17, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63, True, False, 1.0, 0.5)
POINTERS = st.builds(
    lambda dtype, start: torch.zeros(64, dtype=dtype)[start:],
    st.sampled_from((torch.float16, torch.float32)),
    st.sampled_from((0, 1, 8)),
)
CONSTANTS = st.fixed_dictionaries(
    {"WIDTH": st.sampled_from((1, 2, True))},
    optional={"FLAG": st.sampled_from((True, False, 1)), "num_warps": st.sampled_from((1, 4))},
)
CALLS = st.tuples(st.tuples(POINTERS, POINTERS, *[st.sampled_from(NUMBERS)] * 3), CONSTANTS)


@compiles
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, min_size=2, max_size=8))
def test_every_launch_is_the_one_that_triton_makes(
    ours: Kernel, theirs: Any, written: Driver, calls: list[Any]
) -> None:
    for args, constants in calls:
        ours[GRID](*args, **constants)
        theirs[GRID](*args, **constants)
        assert written.launches[-2] == written.launches[-1]


@compiles
def test_it_asks_triton_once_whatever_the_sizes(ours: Kernel, through_triton: list, written: Driver) -> None:
    for numbers in ((0, 1), (1, 16), (2**31 - 1, 0), (-(2**31), -1)):
        ours[GRID](*operands(), 0.5, *numbers, WIDTH=2, num_warps=4)
        ours.bind(WIDTH=2, num_warps=4)[GRID](*operands(), 0.5, *numbers)
    assert len(through_triton) == 1
    assert len(written.launches) == 8
    assert len({repr(compiled) for compiled, *_ in written.launches}) == 1


@compiles
@pytest.mark.parametrize(
    ("pointers", "numbers"),
    [
        (operands(torch.float32), (3, 4)),
        (operands(start=1), (3, 4)),
        (operands(), (2**31, 4)),
        (operands(), (3, True)),
        (operands(), (3, 4.0)),
        ((operands()[0], None), (3, 4)),
    ],
    ids=["another dtype", "a misaligned address", "64 bits", "a bool", "a float", "no tensor"],
)
def test_what_triton_compiles_anew_goes_through_triton(
    ours: Kernel, theirs: Any, through_triton: list, written: Driver, pointers: Any, numbers: Any
) -> None:
    ours[GRID](*operands(), 0.5, 3, 4, WIDTH=2)
    ours[GRID](*pointers, 0.5, *numbers, WIDTH=2)
    assert len(through_triton) == 2
    theirs[GRID](*pointers, 0.5, *numbers, WIDTH=2)
    assert written.launches[-2] == written.launches[-1] != written.launches[0]


@compiles
def test_each_device_has_its_own_function_and_each_launch_the_stream_of_the_moment(
    ours: Kernel, through_triton: list, written: Driver
) -> None:
    pointers = operands()
    for written.device, written.stream in ((90, 7), (91, 7), (90, 8), (91, 9)):
        ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    assert len(through_triton) == 2
    where = [(stream, function[1]) for *_, stream, function, _ in written.launches]
    assert where == [(97, 90), (98, 91), (98, 90), (100, 91)]


@compiles
def test_hooks_see_every_launch(ours: Kernel, through_triton: list) -> None:
    seen: list[Any] = []
    pointers = operands()
    ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
        ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    assert [x.get()["name"] for x in seen] == ["nothing", "nothing"]
    assert len(through_triton) == 3


@compiles
def test_a_kernel_for_debugging_is_another(
    ours: Kernel, through_triton: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers = operands()
    ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    with monkeypatch.context() as debugging:
        debugging.setattr(knobs.runtime, "debug", True)
        ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    ours[GRID](*pointers, 0.5, 3, 4, WIDTH=2)
    assert len(through_triton) == 2


@compiles
def test_nothing_is_remembered_under_a_triton_that_is_not_known(
    ours: Kernel, through_triton: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", "9.0.0")
    for _ in range(3):
        ours[GRID](*operands(), 0.5, 3, 4, WIDTH=2)
    assert len(through_triton) == 3


@launches
def test_numbers_beyond_32_bits_arrive(device: torch.device) -> None:
    ours = kernel(write)
    out = torch.zeros(8, dtype=torch.int64, device=device)
    for number in (7, 7, 2**31 + 5, 7, -3, 2**62, 2**31 - 1):
        ours[(1,)](out, number, WIDTH=4)
        assert out.tolist() == [number] * 4 + [0] * 4


@launches
def test_misaligned_tensors_and_other_dtypes_one_after_another(device: torch.device) -> None:
    ours = kernel(write)
    for number in range(3):
        for dtype in (torch.int64, torch.float16, torch.float32, torch.int32):
            for start in (0, 1):
                memory = torch.zeros(64, dtype=dtype, device=device)
                ours[(1,)](memory[start:], number, WIDTH=32)
                expected = [0] * start + [number] * 32 + [0] * (32 - start)
                assert memory.tolist() == expected


@launches
def test_threads_launch_on_streams_of_their_own(device: torch.device) -> None:
    ours = kernel(write)
    outs = torch.zeros(4, 200, 32, dtype=torch.int32, device=device)
    ours[(1,)](outs[0, 0], 0, WIDTH=32)
    torch.cuda.synchronize()

    def fill(rows: torch.Tensor, first: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i, row in enumerate(rows.unbind()):
                ours[(1,)](row, first + i, WIDTH=32)
        stream.synchronize()

    threads = [Thread(target=fill, args=(rows, 1000 * i)) for i, rows in enumerate(outs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.arange(4)[:, None] * 1000 + torch.arange(200)
    assert torch.equal(outs.cpu(), expected[..., None].expand(-1, -1, 32).int())


def attend_and_differentiate(case: Any, tensors: tuple[torch.Tensor, ...], path: str) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    answer = selected_attention(q, k, v, case.block_indices, path=path, validate=False, **case.options)
    return [*answer, *torch.autograd.grad(answer, (q, k, v), case.output_gradients())]


@launches
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("start", [0, 1])
def test_attention_has_the_bits_that_it_has_through_triton(
    make_case: Callable, path: str, start: int
) -> None:
    case = make_case(q_lens=(300, 77), dtype=torch.bfloat16)
    shifted = [torch.cat((x.flatten()[:start], x.flatten()))[start:].view_as(x) for x in case.tensors[:3]]
    assert all((x.data_ptr() % 16 == 0) == (start == 0) for x in shifted)
    launched: list[Any] = []
    knobs.runtime.launch_enter_hook.add(launched.append)
    try:
        expected = attend_and_differentiate(case, shifted, path)
    finally:
        knobs.runtime.launch_enter_hook.remove(launched.append)
    assert launched
    for _ in range(3):
        for a, b in zip(expected, attend_and_differentiate(case, shifted, path), strict=True):
            assert torch.equal(a, b)


@launches
@pytest.mark.parametrize("path", PATHS)
def test_remembered_kernels_are_captured_in_a_graph(make_case: Callable, path: str) -> None:
    case = make_case(q_lens=(300, 77), dtype=torch.bfloat16)

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return selected_attention(*case.tensors[:4], path=path, validate=False, **case.options)

    expected = [attend() for _ in range(2)][1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

"""Kernels run natively with --device cuda and in Triton's interpreter without a GPU.

The interpreter's tl.dot is wrong for bfloat16, and it is slow: there float16 and float32 run, on few shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from fsa_core.problem import Problem
from tests.fsa_core.conftest import Case

# Kernels are imported where they are used: a conftest.py is read before the suite has chosen the interpreter.


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every kernel test runs in poisoned memory."""


def gradients(
    case: Case, **options: int | str
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    """The gradients, and those of out and lse that they come from."""
    from fsa_core.kernels.backward import selected_attention_backward
    from fsa_core.kernels.forward import selected_attention_forward

    answer = selected_attention_forward(case.problem, *case.tensors)
    given = case.output_gradients()
    return selected_attention_backward(case.problem, *case.tensors, *answer, *given, **options), given


@pytest.fixture
def check_forward(make_case: Callable, assert_close_to_oracle: Callable) -> Callable:
    from fsa_core.kernels.forward import selected_attention_forward

    def run(**options: object) -> None:
        case = make_case(**options)
        assert_close_to_oracle(*selected_attention_forward(case.problem, *case.tensors), case)

    return run


@pytest.fixture
def check_gradients(make_case: Callable, assert_gradients_close_to_oracle: Callable) -> Callable:
    def run(**options: object) -> None:
        case = make_case(**options)
        grads, given = gradients(case)
        assert_gradients_close_to_oracle(grads, case, *given)

    return run


@pytest.fixture
def replace_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable], None]]:
    """Puts something else in the place of what kernels for Hopper, interpreted, call by a name."""
    from tests import gluon_interpreter

    def put(name: str, other: Callable) -> None:
        monkeypatch.setitem(gluon_interpreter._REPLACED, name, other)
        gluon_interpreter._in_python.cache_clear()

    yield put
    gluon_interpreter._in_python.cache_clear()


@pytest.fixture(autouse=True)
def tiles_for_the_interpreter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each program and each element of a tile, not for what the GPU pays for."""
    if device.type == "cpu":
        from fsa_core.kernels import delta, index, key_gradients, partials, share_sums, sorted_index

        monkeypatch.setattr(partials, "MERGE_ROWS", 64)
        monkeypatch.setattr(delta, "DELTA_ROWS", 256)
        monkeypatch.setattr(key_gradients, "SUM_KEYS", 256)
        monkeypatch.setattr(share_sums, "SUM_ROWS", 64)
        for module in (index, sorted_index):
            monkeypatch.setattr(module, "PAIRS_IN_TILE", 256)
        interpreter = "triton.runtime.interpreter"
        monkeypatch.setattr(f"{interpreter}.ScanOps.generic_scan", _scan_by_doubling)
        monkeypatch.setattr(f"{interpreter}.ReduceOps.generic_reduce", _reduce_by_halving)


def _scan_by_doubling(self: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """As a GPU scans: log2(size) times all elements at once; the interpreter takes one after another."""
    arrays = [x.handle.data for x in tensors]
    size = arrays[0].shape[self.axis]
    place = np.arange(size).reshape([-1 if axis == self.axis else 1 for axis in range(arrays[0].ndim)])
    for step in (1 << i for i in range((size - 1).bit_length())):
        shifted = [np.roll(array, step, self.axis) for array in arrays]
        joined = _combine(self, tensors, (*shifted, *arrays))
        arrays = [np.where(place < step, x, y) for x, y in zip(arrays, joined, strict=True)]
    return [self.to_tensor(array, x.dtype) for array, x in zip(arrays, tensors, strict=True)]


def _reduce_by_halving(self: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """Of one axis, log2(size) times all elements at once; tl.sort reduces pairs that way, for every step."""
    arrays = [x.handle.data for x in tensors]
    while arrays[0].shape[self.axis] > 1:
        halves = [np.split(array, 2, self.axis) for array in arrays]
        arrays = _combine(self, tensors, [half[side] for side in (0, 1) for half in halves])
    if not self.keep_dims:
        arrays = [array.squeeze(self.axis) for array in arrays]
    return [self.to_tensor(array, x.dtype) for array, x in zip(arrays, tensors, strict=True)]


def _combine(operation: Any, tensors: tuple[Any, ...], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    pairs = zip(arrays, (*tensors, *tensors), strict=True)
    joined = operation.combine_fn.fn(*(operation.to_tensor(array, x.dtype) for array, x in pairs))
    return [x.handle.data for x in (joined if isinstance(joined, tuple) else (joined,))]


@pytest.fixture
def by_twins(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes kernels for Hopper give way to their twins, whose query tiles are as large."""
    from fsa_core.backward_plan import QUERY_ROWS
    from fsa_core.kernels import backward, hopper, hopper_tile_query_gradients
    from fsa_core.kernels.hopper_tiles import ROWS

    def query_tile_rows(problem: Problem, _device: torch.device) -> int:
        return ROWS if hopper_tile_query_gradients.fills(problem) else QUERY_ROWS

    def switch() -> None:
        monkeypatch.setattr(backward, "query_tile_rows", query_tile_rows)
        monkeypatch.setattr(hopper, "runs_on", lambda _device: False)
        _forget_calls(monkeypatch)

    _forget_calls(monkeypatch)
    return switch


@pytest.fixture
def small_calls_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for Hopper take all chunks in one launch however little there is."""
    from fsa_core.kernels import hopper

    monkeypatch.setattr(hopper, "MIN_FORWARD_BYTES", 0)
    monkeypatch.setattr(hopper, "MIN_GRADIENT_BYTES", 0)
    _forget_calls(monkeypatch)


def _forget_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels a known call went to is remembered."""
    from fsa_core.kernels import backward, compressed, forward, selection
    from fsa_core.kernels.replay import Replayed

    for module in (forward, compressed, selection):
        monkeypatch.setattr(module, "_replayed", Replayed(module._forward))
    monkeypatch.setattr(backward, "_replayed", Replayed(backward._gradients))
    monkeypatch.setattr(backward, "_replayed_keys", Replayed(backward._key_gradients))
    monkeypatch.setattr(backward, "_replayed_queries", Replayed(backward._query_gradients))
    monkeypatch.setattr(backward, "planned", lru_cache(backward.planned.__wrapped__))


@pytest.fixture(params=("tl", "gluon"))
def language(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Kernels of two languages run in this one: the GPU's own, or interpreted."""
    from fsa_core.kernels import hopper

    if device.type == "cpu" and request.param == "gluon":
        from tests.gluon_interpreter import interpreted

        with interpreted():
            yield request.param
        return
    if request.param == "gluon" and not hopper.runs_on(device):
        pytest.skip("kernels in Gluon run on Hopper")
    if request.param == "tl":
        monkeypatch.setattr(hopper, "runs_on", lambda _device: False)
    _forget_calls(monkeypatch)
    yield request.param


@pytest.fixture(params=("float16", "bfloat16"))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and request.param == "bfloat16":
        pytest.skip("tl.dot on bfloat16 is wrong in the Triton interpreter")
    return getattr(torch, request.param)

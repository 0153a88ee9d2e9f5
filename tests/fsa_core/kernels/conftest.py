"""Kernels run natively with --device cuda and in Triton's interpreter without a GPU.

The interpreter's tl.dot is wrong for bfloat16, and it is slow: there float16 and float32 run, on few shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

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


@pytest.fixture(autouse=True)
def tiles_for_the_interpreter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each program and each element of a tile, not for what the GPU pays for."""
    if device.type == "cpu":
        from fsa_core.kernels import backward, delta, forward, index, share_sums, sorted_index

        monkeypatch.setattr(forward, "MERGE_ROWS", 64)
        monkeypatch.setattr(delta, "DELTA_ROWS", 256)
        monkeypatch.setattr(backward, "SUM_KEYS", 256)
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


@pytest.fixture(params=("float16", "bfloat16"))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and request.param == "bfloat16":
        pytest.skip("tl.dot on bfloat16 is wrong in the Triton interpreter")
    return getattr(torch, request.param)

"""Kernels run natively with --device cuda and in Triton's interpreter without a GPU.

The interpreter's tl.dot is wrong for bfloat16, and it is slow: there float16 and float32 run, on few shapes.
"""

import pytest
import torch

GROUP_SIZES = (1, 2, 3, 4, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every kernel test runs in poisoned memory."""


@pytest.fixture(autouse=True)
def tiles_for_the_interpreter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each program and each element of a tile, not for what the GPU pays for."""
    if device.type == "cpu":
        # Not above: a conftest.py is read before the suite has chosen the interpreter.
        from fsa_core.kernels import backward, forward, index, sorted_index

        monkeypatch.setattr(forward, "MERGE_ROWS", 64)
        monkeypatch.setattr(backward, "DELTA_ROWS", 256)
        monkeypatch.setattr(backward, "SUM_ROWS", 64)
        for module in (index, sorted_index):
            monkeypatch.setattr(module, "PAIRS_IN_TILE", 256)


@pytest.fixture(params=("float16", "bfloat16"))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and request.param == "bfloat16":
        pytest.skip("tl.dot on bfloat16 is wrong in the Triton interpreter")
    return getattr(torch, request.param)

"""Selection by the kernel that is for Hopper alone: the blocks of its twin, ties included.

Without such a GPU tests/hopper_grid.py compiles the kernel, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.kernels import hopper, selection
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import select_blocks
from tests.fsa_core.kernels.test_selection import with_ties
from tests.fsa_core.nsa.conftest import Call
from tests.fsa_core.nsa.conftest import _make_call as make_call

CONFIG = NSAConfig()
SIZES = {"q_lens": (700, 0, 1, 300), "num_kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16}
# More blocks than a step has.
LONG = {"q_lens": (1300,), "k_lens": (9000,), "num_kv_heads": 1}


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


@pytest.fixture
def check(by_twins: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        launched: list[bool] = []
        launch = selection._launch_on_hopper
        with monkeypatch.context() as patches:
            patches.setattr(
                selection, "_launch_on_hopper", lambda *args: launched.append(launch(*args)) or launched[-1]
            )
            found = selected(call)
        assert launched == [True]
        by_twins()
        assert torch.equal(found, selected(call))

    return run


def selected(call: Call) -> torch.Tensor:
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    options = {"config": call.config, "softmax_scale": call.softmax_scale, "backend": "triton"}
    return select_blocks(call.q, call.k_cmp, **starts, **options)


@pytest.mark.parametrize("group_size", [2, 4, 5, 16])
@pytest.mark.parametrize("sizes", [{}, LONG, {"head_dim": 64, "dtype": torch.float16}], ids=str)
def test_every_group_size(device: torch.device, check: Callable, group_size: int, sizes: dict) -> None:
    check(make_call(device, group_size=group_size, config=CONFIG, **SIZES | sizes))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 16},
        {"kernel_size": 64},
        {"stride": 32},
        {"block_size": 128},
        {"block_size": 32},
        {"top_k": 3, "num_local_blocks": 1},
        {"top_k": 5, "num_first_blocks": 0, "num_local_blocks": 0},
        {"top_k": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [{}, LONG], ids=["packed", "long"])
def test_every_size(device: torch.device, check: Callable, options: dict, sizes: dict) -> None:
    config = replace(CONFIG, **options)
    check(make_call(device, group_size=4, config=config, **SIZES | sizes))


@pytest.mark.parametrize("spread", [0, 3, 200])
def test_ties(device: torch.device, check: Callable, spread: int) -> None:
    config = replace(CONFIG, num_first_blocks=0, num_local_blocks=0)
    check(with_ties(make_call(device, group_size=2, config=config, **SIZES | LONG), spread))


def test_rows_of_nan(device: torch.device, check: Callable) -> None:
    call = make_call(device, group_size=2, config=CONFIG, **SIZES)
    q = call.q.clone()
    q[90, 0, 0] = torch.nan
    check(replace(call, q=q))


def test_programs_with_many_tiles(device: torch.device, check: Callable) -> None:
    check(make_call(device, group_size=2, config=CONFIG, **SIZES | {"q_lens": (9000, 129, 40000)}))

"""Gradients of compressed and sliding-window attention by the kernel that is for Hopper alone: the oracle's,
and the bits of its twin where that has as many rows a step.

Without such a GPU tests/hopper_grid.py compiles the kernel, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from fsa_core.kernels import hopper, interval_key_gradients
from fsa_core.nsa.config import NSAConfig
from tests.fsa_core.nsa.conftest import Branch
from tests.fsa_core.nsa.conftest import _make_call as make_call

SIZES = {"q_lens": (700, 0, 1, 300), "head_dim": 128, "value_dim": 128, "dtype": torch.bfloat16}
BRANCHES = ("compressed", "window")


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each walk was the kernel for Hopper's."""
    walks: list[bool] = []
    launch = interval_key_gradients._launch_on_hopper

    def note(*args: object) -> bool:
        walks.append(launch(*args))
        return walks[-1]

    monkeypatch.setattr(interval_key_gradients, "_launch_on_hopper", note)
    yield walks
    assert walks
    assert all(walks)


@pytest.fixture
def check(device: torch.device, launched: list[bool], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(branch: str, **options: object) -> None:
        checked = Branch(branch, make_call(device, **SIZES | options), backend="triton")
        checked.check()
        grads = gradients(checked)
        with monkeypatch.context() as patches:
            patches.setattr(hopper, "runs_on", lambda _device: False)
            twins = gradients(checked)
        # A sliding window's twin has fewer rows a step of keys: other sums.
        same = slice(1) if branch == "window" else slice(3)
        assert all(torch.equal(x, y) for x, y in zip(grads[same], twins[same], strict=True))

    return run


def gradients(branch: Branch, **options: int) -> tuple[torch.Tensor, ...]:
    """Of q, k and v, through out alone."""
    operands = tuple(x.detach().requires_grad_() for x in branch.operands)
    out, _ = branch.run(*operands, **options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, operands, grad_out)


# Rows of q that tokens fill, and do not; of keys a token's heads at once, and in parts.
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 16, 33, 64, 100, 128])
def test_every_group_size(check: Callable, branch: str, group_size: int) -> None:
    check(branch, group_size=group_size, num_kv_heads=1)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (64, 128), (128, 64)])
def test_every_width(check: Callable, branch: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(branch, head_dim=head_dim, value_dim=value_dim, dtype=dtype, group_size=4)


# Windows of four keys' stride are many tiles, and halves of tiles that are not there.
@pytest.mark.parametrize("k_len", [8, 100, 260, 264, 516, 520, 777, 1100])
def test_tiles_that_windows_do_not_fill(check: Callable, k_len: int) -> None:
    check("compressed", q_lens=(k_len, 40), group_size=4, num_kv_heads=1)


@pytest.mark.parametrize("config", [NSAConfig(), NSAConfig(kernel_size=64, stride=64)])
def test_windows_of_other_sizes(check: Callable, config: NSAConfig) -> None:
    check("compressed", q_lens=(3000, 500), config=config, group_size=4)


@pytest.mark.parametrize("window", [1, 20, 63, 64, 65, 128, 300, 2**40])
def test_a_sliding_window_of_any_size(check: Callable, window: int) -> None:
    check("window", config=NSAConfig(window=window), group_size=4)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    ("q_lens", "k_lens"), [((400, 90), (2000, 95)), ((300, 200), (120, 0))], ids=["chunks", "early queries"]
)
def test_other_sequences_than_queries(
    check: Callable, branch: str, q_lens: tuple[int, ...], k_lens: tuple[int, ...]
) -> None:
    check(branch, q_lens=q_lens, k_lens=k_lens, group_size=4)


@pytest.mark.parametrize("branch", BRANCHES)
def test_large_logits_stay_finite_and_right(check: Callable, branch: str) -> None:
    check(branch, q_scale=16.0, dtype=torch.float16, group_size=4)


@pytest.mark.usefixtures("launched")
def test_heads_that_take_turns_have_the_same_bits(device: torch.device) -> None:
    branch = Branch("compressed", make_call(device, **SIZES, num_kv_heads=3), backend="triton")
    at_once, in_turns = (gradients(branch, workspace_limit_bytes=limit) for limit in (2**28, 1))
    assert all(torch.equal(x, y) for x, y in zip(at_once, in_turns, strict=True))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("name", BRANCHES)
def test_the_same_bits_on_every_run(device: torch.device, name: str) -> None:
    sizes = SIZES | {"q_lens": (6000, 900), "group_size": 4}
    branch = Branch(name, make_call(device, **sizes, config=NSAConfig()), backend="triton")
    first, again = gradients(branch), gradients(branch)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

"""The means of windows by their kernels, and their gradients, against float64."""

import pytest
import torch

from fsa_core.nsa import compression
from fsa_core.nsa.compression import MeanCompression

# Windows that overlap by half, that touch, whose strides are no whole part of them, of one key.
SIZES = [(32, 16), (4, 4), (7, 3), (1, 1)]
# Of each sequence: no window, one, many tiles of them with tokens left over, two alike.
LENGTHS = (3, 32, 0, 1500, 70, 70)


@pytest.fixture(autouse=True)
def _by_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in Triton's interpreter, where torch would do otherwise."""
    taken = compression.resolve_backend
    monkeypatch.setattr(compression, "resolve_backend", lambda _backend, device: taken("triton", device))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [(2, 16), (3, 80), (1, 1)], ids=str)
def test_means_and_gradients(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], width: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    x = torch.randn(starts[-1], *width, device=device).to(dtype).requires_grad_()
    true_x = x.detach().double().requires_grad_()
    means, true = (MeanCompression(*sizes)(t, starts) for t in (x, true_x))
    grad = torch.randn_like(means)
    (grad_x,) = torch.autograd.grad(means, x, grad)
    (true_grad_x,) = torch.autograd.grad(true, true_x, grad.double())
    # One rounding at the end, of float32 sums.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    for got, expected in ((means, true), (grad_x, true_grad_x)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, **tolerance)


def test_kernels_are_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_core.kernels import means

    ran = []
    for name in ("means", "spread"):
        made = getattr(means, name)
        monkeypatch.setattr(means, name, lambda *args, made=made: ran.append(made.__name__) or made(*args))
    x = torch.zeros(70, 2, 16, device=device, requires_grad=True)
    MeanCompression(32, 16)(x).sum().backward()
    assert ran == ["means", "spread"]
    with torch.no_grad():
        MeanCompression(32, 16)(x)
    assert ran == ["means", "spread", "means"]


def test_rows_that_do_not_lie_one_behind_the_other(device: torch.device) -> None:
    x = torch.randn(70, 2, 16, device=device)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(MeanCompression(8, 4)(strided), MeanCompression(8, 4)(x))


def test_second_derivatives(device: torch.device) -> None:
    """Of a square of means: a linear function of a linear one."""
    x = torch.randn(40, 1, 16, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(MeanCompression(8, 4)(x).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), x)
    true_x = x.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(MeanCompression(8, 4)(true_x).square().sum(), true_x, create_graph=True)
    (expected,) = torch.autograd.grad(true.square().sum(), true_x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)

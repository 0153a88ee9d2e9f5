"""The gated sum of three branches by its kernels, forward and backward, against float64."""

import pytest
import torch

from fsa_core.nsa.functional import gated_sum


def operands(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, gate_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Gates, three branches and the gradient of their sum."""
    torch.manual_seed(0)
    gates = torch.rand(*shape[:2], 3, device=device).to(gate_dtype)
    return gates, *(torch.randn(shape, device=device).to(dtype) for _ in range(4))


def summed(
    gates: torch.Tensor, *others: torch.Tensor, backend: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    leaves = tuple(x.detach().requires_grad_() for x in (gates, *others[:3]))
    out = gated_sum(leaves[1:], leaves[0], backend=backend)
    return out, torch.autograd.grad(out, leaves, others[3])


# Less than a program's rows, and a last program with a few; one row of numbers as wide as any.
@pytest.mark.parametrize("shape", [(1, 1, 16), (37, 6, 128), (50, 3, 80), (9, 2, 256)])
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
def test_sums_and_gradients(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    gate_dtype: torch.dtype | None,
) -> None:
    given = operands(device, shape, dtype, dtype if gate_dtype is None else gate_dtype)
    out, grads = summed(*given, backend="triton")
    true, true_grads = summed(*(x.double() for x in given), backend="torch")
    # One rounding at the end, of float32 sums.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    for got, expected, like in zip((out, *grads), (true, *true_grads), (given[1], *given), strict=False):
        assert got.dtype == like.dtype
        torch.testing.assert_close(got.double(), expected, **tolerance)


def test_only_the_gradients_asked_for_are_needed(device: torch.device) -> None:
    gates, *others = operands(device, (5, 2, 32), torch.float16, torch.float16)
    gates.requires_grad_()
    out = gated_sum(tuple(others[:3]), gates, backend="triton")
    (grad,) = torch.autograd.grad(out, gates, others[3])
    expected = torch.stack([(others[3].double() * x.double()).sum(-1) for x in others[:3]], -1)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5)


def test_rows_that_do_not_lie_one_behind_the_other(device: torch.device) -> None:
    gates, *others = operands(device, (6, 4, 32), torch.float16, torch.float16)
    expected = gated_sum(tuple(others[:3]), gates, backend="triton")
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in others[:3])
    assert torch.equal(gated_sum(strided, gates, backend="triton"), expected)


def test_no_query(device: torch.device) -> None:
    gates, *others = operands(device, (0, 4, 32), torch.float16, torch.float16)
    assert gated_sum(tuple(others[:3]), gates, backend="triton").shape == (0, 4, 32)

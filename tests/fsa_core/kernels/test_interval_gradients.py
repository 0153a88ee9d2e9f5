"""What the gradients of compressed and of sliding-window attention promise beside being right."""

from collections.abc import Callable, Sequence

import pytest
import torch

from fsa_core.kernels.windows import TileShape
from fsa_core.nsa.functional import compressed_attention, sliding_window_attention
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from tests.fsa_core.nsa.conftest import SMALL, Call
from tests.fsa_core.nsa.conftest import _make_call as make_call

BRANCHES = (compressed_attention, sliding_window_attention)


def operands_of(branch: Callable, call: Call) -> tuple[torch.Tensor, ...]:
    return (call.q, call.k_cmp, call.v_cmp) if branch is compressed_attention else (call.q, call.k, call.v)


def gradients(
    branch: Callable,
    operands: Sequence[torch.Tensor],
    grad_out: torch.Tensor,
    starts: torch.Tensor | None = None,
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
    **options: bool,
) -> tuple[torch.Tensor, ...]:
    """Of q, k and v, through out alone; each sequence has as many keys as queries."""
    leaves = [x.detach().requires_grad_() for x in operands]
    given = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "workspace_limit_bytes": workspace_limit_bytes}
    out, _ = branch(*leaves, config=SMALL, backend="triton", **given)
    return torch.autograd.grad(out, leaves, grad_out, **options)


def grad_out_of(call: Call) -> torch.Tensor:
    size = (*call.q.shape[:2], call.v.shape[2])
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(call.q)


@pytest.mark.parametrize("group_size", [1, 3, 4, 5, 6, 33, 64, 100, 128])
def test_steps_of_keys_have_no_row_that_is_not_there(group_size: int) -> None:
    tile = TileShape(rows=64, keys=128).full_tile(group_size)
    assert (tile.tokens * tile.heads, tile.heads * tile.parts) == (64, group_size)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_have_the_same_bits_on_every_run(branch: Callable, device: torch.device) -> None:
    call = make_call(device, q_lens=(60, 30), num_kv_heads=1, group_size=3, dtype=torch.float16)
    first, second = (
        gradients(branch, operands_of(branch, call), grad_out_of(call), call.cu_seqlens_q) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_heads_that_do_not_fit_the_workspace_together_take_turns(device: torch.device) -> None:
    call = make_call(device, q_lens=(60,), num_kv_heads=3, dtype=torch.float16)
    given = (compressed_attention, operands_of(compressed_attention, call), grad_out_of(call))
    # 14 windows of 16 + 24 numbers in float32, from 4 programs each: 8,960 bytes a head.
    at_once, *in_turns = (gradients(*given, workspace_limit_bytes=limit) for limit in (2**20, 20000, 1))
    for turns in in_turns:
        assert all(torch.equal(a, b) for a, b in zip(at_once, turns, strict=True))


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_request_alone_has_the_gradients_it_has_in_company(branch: Callable, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    lens = torch.randint(1, 900, (20,)).tolist()
    call = make_call(device, q_lens=lens, group_size=3, dtype=torch.bfloat16, head_dim=128, value_dim=128)
    operands, grad_out = operands_of(branch, call), grad_out_of(call)
    company = gradients(branch, operands, grad_out, call.cu_seqlens_q)
    first_window = 0
    for start, length in zip(call.cu_seqlens_q.tolist(), lens, strict=False):
        rows = keys = slice(start, start + length)
        if branch is compressed_attention:
            keys = slice(first_window, first_window + len(range(8, length + 1, 4)))
            first_window = keys.stop
        here = (rows, keys, keys)
        alone = gradients(branch, [x[at] for x, at in zip(operands, here, strict=True)], grad_out[rows])
        for got, whole, at in zip(alone, company, here, strict=True):
            assert torch.equal(got, whole[at])


@pytest.mark.parametrize("branch", BRANCHES)
def test_operands_of_any_strides_and_some_without_a_gradient(branch: Callable, device: torch.device) -> None:
    call = make_call(device, q_lens=(40,), dtype=torch.float16)
    q, k, v = operands_of(branch, call)
    expected = gradients(branch, (q, k, v), grad_out_of(call))
    strided = q.transpose(0, 1).contiguous().requires_grad_()
    out, lse = branch(strided.transpose(0, 1), k, v.repeat(2, 1, 1)[: len(v)], config=SMALL, backend="triton")
    assert lse.requires_grad
    out.backward(grad_out_of(call))
    assert torch.equal(strided.grad.transpose(0, 1), expected[0])
    assert k.grad is None


@pytest.mark.parametrize("branch", BRANCHES)
def test_second_derivatives_are_refused(branch: Callable, device: torch.device) -> None:
    call = make_call(device, q_lens=(20,), dtype=torch.float16)
    first = gradients(
        branch, operands_of(branch, call), grad_out_of(call).requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        first[0].sum().backward()

"""Compressed and sliding-window attention against the oracle: answers, gradients, memory, errors."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsa_core.errors import InputError
from fsa_core.nsa.functional import compressed_attention, select_blocks, sliding_window_attention
from tests.fsa_core.nsa.conftest import SMALL, Branch, assert_close_to_oracle, cumulative

BRANCHES = ("compressed", "window")
LENS = {
    "packed, empty, shorter than a window": ((90, 0, 5, 33), None),
    "chunked prefill and decode": ((40, 1, 1), (90, 65, 9)),
    "more queries than keys": ((30, 20), (12, 0)),
}


@pytest.mark.parametrize("limit", [1, 30_000, 2**26], ids=lambda limit: f"{limit} bytes")
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
@pytest.mark.parametrize("name", BRANCHES)
def test_answers_and_gradients_are_the_oracles(make_call, name, lens, limit):
    """In chunks of one query, of a few, of all; the first queries of a sequence see no window."""
    branch = Branch(name, make_call(q_lens=lens[0], k_lens=lens[1], group_size=3))

    def run(*operands):
        return branch.run(*operands, workspace_limit_bytes=limit)

    assert_close_to_oracle(run, branch.eager, branch.oracle, branch.operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BRANCHES)
def test_half_precision_costs_no_more_than_eagerly(make_call, name, dtype):
    branch = Branch(name, make_call(dtype=dtype, group_size=3))
    branch.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BRANCHES)
def test_large_scores_stay_finite_and_right(make_call, name, dtype):
    branch = Branch(name, make_call(q_scale=16.0, dtype=dtype))
    branch.check()


@pytest.mark.parametrize("window", [1, 2, 64, 1000])
def test_windows_of_any_size(make_call, window):
    config = replace(SMALL, window=window)
    branch = Branch("window", make_call(q_lens=(90, 20), k_lens=(90, 70), config=config))
    branch.check()


@pytest.mark.parametrize("kernel_size", [1, 4, 16, 64])
def test_compression_windows_of_any_size(make_call, kernel_size):
    config = replace(SMALL, kernel_size=kernel_size, stride=min(kernel_size, 4))
    branch = Branch("compressed", make_call(config=config))
    branch.check()


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("stage", ["compressed", "window", "selection"])
def test_no_array_of_queries_times_keys_exists(make_call, stage):
    """Forward and backward: the largest array is an answer's size, or within the workspace."""
    call = make_call(q_lens=(3000,), num_kv_heads=1, config=replace(SMALL, window=1500))
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v, call.k_cmp, call.v_cmp)]
    limit, largest_operand = 2**18, 4 * 3000 * 2 * 24  # q, or the answer
    q, k, v, k_cmp, v_cmp = leaves
    options = {"config": call.config, "workspace_limit_bytes": limit}
    with LargestTensor() as largest:
        if stage == "selection":
            select_blocks(q, k_cmp, **options)
        elif stage == "compressed":
            sum(x[100:].sum() for x in compressed_attention(q, k_cmp, v_cmp, **options)).backward()
        else:
            sum(x.sum() for x in sliding_window_attention(q, k, v, **options)).backward()
    assert largest.bytes <= max(limit, largest_operand)
    scores = {"window": 2 * 3000 * 1500 * 4}.get(stage, 2 * len(q) * len(k_cmp) * 4)
    assert scores > 20 * max(limit, largest_operand), "the array that must not exist would have been noticed"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", BRANCHES)
def test_queries_without_keys_disturb_nothing(make_call, name, backend):
    """Whatever is made of their lse: its gradient there is most often NaN."""
    branch = Branch(name, make_call(q_lens=(40, 20), k_lens=(30, 20)), backend)
    leaves = [x.detach().requires_grad_() for x in branch.operands]
    out, lse = branch.run(*leaves)
    seen = lse > -torch.inf
    assert not seen.all()
    expected = torch.autograd.grad((out.sum(), lse[seen].square().sum()), leaves, retain_graph=True)
    masked = lse.square().where(seen, 0.0).sum()
    for got, true in zip(torch.autograd.grad((out.sum(), masked), leaves), expected, strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("name", BRANCHES)
def test_in_torch_operations_nor_does_any_gradient_of_their_output(make_call, name):
    branch = Branch(name, make_call(q_lens=(40, 20), k_lens=(30, 20)), "torch")
    leaves = [x.detach().requires_grad_() for x in branch.operands]
    out, lse = branch.run(*leaves)
    given = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, given, retain_graph=True)
    given[lse == -torch.inf] = torch.nan
    assert given.isnan().any()
    assert all(map(torch.equal, torch.autograd.grad(out, leaves, given), expected))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", BRANCHES)
def test_starts_of_inference_mode_serve_to_train(make_call, name, backend):
    with torch.inference_mode():
        starts = cumulative((20, 20))
    call = make_call(q_lens=(20, 20))
    device = call.q.device
    branch = Branch(
        name, replace(call, cu_seqlens_q=starts.to(device), cu_seqlens_k=starts.to(device)), backend
    )
    q, *others = branch.operands
    out, _ = branch.run(q.requires_grad_(), *others)
    out.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("name", BRANCHES)
def test_starts_that_were_overwritten_are_noticed(make_call, name):
    """As other operands are: kernels read them again, and would give gradients of other sequences."""
    call = make_call(q_lens=(20, 20))
    branch = Branch(name, call, "triton")
    q, *others = branch.operands
    out, _ = branch.run(q.requires_grad_(), *others)
    call.cu_seqlens_q[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", BRANCHES)
def test_autocast_around_a_backward_pass_changes_nothing(make_call, device, name):
    branch = Branch(name, make_call())
    leaves = [x.detach().requires_grad_() for x in branch.operands]
    out, _ = branch.run(*leaves)
    expected = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    grad_out = (2 * out).detach()
    with torch.autocast(device.type, torch.bfloat16):
        got = torch.autograd.grad(out, leaves, grad_out)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", BRANCHES)
def test_a_second_derivative_is_refused_and_not_taken_for_zero(make_call, name):
    branch = Branch(name, make_call())
    leaves = [x.detach().requires_grad_() for x in branch.operands]
    out, _ = branch.run(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (out.sum() + grads[0].square().sum()).backward()


@pytest.mark.parametrize("head_dim", [16, 17, 66])
@pytest.mark.parametrize("name", BRANCHES)
def test_company_changes_no_bit(make_call, device, name, head_dim):
    """Whatever the address at which a sequence begins: products of matrices round by its alignment."""
    config = replace(SMALL, kernel_size=16, stride=8)
    sizes = {"num_kv_heads": 1, "group_size": 1, "head_dim": head_dim, "value_dim": head_dim}
    call = make_call(q_lens=(7, 90), config=config, **sizes)
    starts = cumulative((90,)).to(device)
    # Seven keys have no window.
    q, k, v = (x[7:].clone() for x in (call.q, call.k, call.v))
    alone = Branch(name, replace(call, q=q, k=k, v=v, cu_seqlens_q=starts, cu_seqlens_k=starts))
    packed = Branch(name, call)
    assert torch.equal(packed.run(*packed.operands)[0][7:], alone.run(*alone.operands)[0])


@pytest.mark.parametrize("name", BRANCHES)
def test_no_queries_give_an_empty_answer(make_call, name):
    branch = Branch(name, make_call(q_lens=(0,), k_lens=(30,)))
    out, lse = branch.run(*branch.operands)
    assert out.shape == (0, 4, 24)
    assert lse.shape == (0, 4)


def test_bad_calls_are_refused_by_field(make_call):
    call = make_call(q_lens=(70, 33))
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k, "config": call.config}
    with pytest.raises(
        InputError, match="k_cmp has token count 22: expected 23, the windows in 103 keys"
    ) as error:
        compressed_attention(call.q, call.k_cmp[1:], call.v_cmp[1:], **starts)
    assert error.value.reason == "INVALID_TOKENS"
    bad = torch.tensor([0, 70, 60], dtype=torch.int32, device=call.q.device)
    with pytest.raises(InputError, match=r"cu_seqlens_k\[2\] is 60: expected at least 70"):
        select_blocks(call.q, call.k_cmp, **(starts | {"cu_seqlens_k": bad}))
    with pytest.raises(InputError, match=r"cu_seqlens_k has dtype int64: expected int32"):
        select_blocks(call.q, call.k_cmp, **(starts | {"cu_seqlens_k": call.cu_seqlens_k.long()}))
    with pytest.raises(InputError, match="k has 2 heads, q has 3"):
        sliding_window_attention(call.q[:, :3], call.k, call.v, **starts)

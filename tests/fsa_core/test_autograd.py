"""Gradients through the public functions; the backends' own tests have the many shapes."""

import warnings
from dataclasses import replace

import pytest
import torch

from fsa_core.api import attend, dense_attention, selected_attention


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    return request.param


def answer(case, q, k, v, **options):
    if case.problem.is_dense:
        return dense_attention(q, k, v, **(case.options | options))
    return selected_attention(q, k, v, case.block_indices, **(case.options | options))


def leaves(case):
    return [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]


def gradients(case, grad_out, grad_lse, **options):
    operands = leaves(case)
    out, lse = answer(case, *operands, **options)
    return torch.autograd.grad((out, lse), operands, (grad_out, grad_lse))


def assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_gradients_flow_through_out_and_lse(
    make_case, assert_gradients_close_to_oracle, backend, through, dtype, dense
):
    case = make_case(q_lens=(20, 13), group_size=3, head_dim=16, dtype=dtype, dense=dense)
    grad_out, grad_lse = case.output_gradients()
    operands = leaves(case)
    out, lse = answer(case, *operands, backend=backend)
    if through == "out":
        out.backward(grad_out)
        grad_lse = torch.zeros_like(grad_lse)
    elif through == "lse":
        lse.backward(grad_lse)
        grad_out = torch.zeros_like(grad_out)
    else:
        torch.autograd.backward((out, lse), (grad_out, grad_lse))
    assert_gradients_close_to_oracle([x.grad for x in operands], case, grad_out, grad_lse)


def test_the_gradients_of_the_kernels_reach_the_caller(make_case, assert_gradients_close_to_oracle):
    case = make_case(q_lens=(9,), num_kv_heads=1, head_dim=16, dtype=torch.float16)
    given = case.output_gradients()
    grads = gradients(case, *given, backend="triton")
    assert_gradients_close_to_oracle(grads, case, *given)


@pytest.mark.parametrize("dense", [False, True])
def test_float32_gradients_are_those_of_differences(make_case, backend, dense):
    """Each number of q, and of the last key of a block and the first of the next, is moved by itself."""
    case = make_case(q_lens=(2,), k_lens=(18,), num_kv_heads=1, head_dim=16, dense=dense)
    k, v = case.k, case.v

    def run(q, some_k, some_v):
        moved = (torch.cat([x[:15], some, x[17:]]) for x, some in ((k, some_k), (v, some_v)))
        return answer(case, q, *moved, backend=backend)

    operands = leaves(replace(case, k=k[15:17], v=v[15:17]))
    with warnings.catch_warnings():
        # That float32 is less precise than it would like.
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(run, operands, eps=1e-2, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_those_get_gradients_that_ask_for_them(make_case, names):
    case = make_case(head_dim=16)
    grads = dict(zip("qkv", gradients(case, *case.output_gradients()), strict=True))
    operands = {name: x.clone() for name, x in zip("qkv", (case.q, case.k, case.v), strict=True)}
    asking = [operands[name].requires_grad_() for name in names]
    got = torch.autograd.grad(answer(case, **operands), asking, case.output_gradients())
    assert_same(got, [grads[name] for name in names])


def test_an_expanded_gradient_is_taken(make_case):
    """As a sum gives it: one number, with strides of zero."""
    case = make_case(head_dim=16)
    ones = [torch.ones_like(x) for x in case.output_gradients()]
    operands = leaves(case)
    out, lse = answer(case, *operands)
    (out.sum() + lse.sum()).backward()
    assert_same([x.grad for x in operands], gradients(case, *ones))


def test_any_strides(make_case):
    case = make_case(head_dim=16)
    given = case.output_gradients()
    expected = gradients(case, *given)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    operands = [strided(x.detach()).requires_grad_() for x in (case.q, case.k, case.v)]
    got = torch.autograd.grad(answer(case, *operands), operands, [strided(x) for x in given])
    assert_same(got, expected)


def test_a_row_for_several_queries(make_case):
    """The rows of a normal form in which 8 neighbours agree, given once."""
    case = make_case(q_lens=(40, 20), num_slots=2, head_dim=16)
    case.block_indices.copy_(torch.tensor([0, -1]))
    rows = replace(case, block_indices=case.block_indices[:, : 5 + 3].contiguous())
    given = case.output_gradients()
    assert_same(gradients(rows, *given, query_block_size=8), gradients(case, *given))


def test_tokens_without_keys_disturb_nothing(make_case, backend):
    """Whatever gradient their answers get: the loss may well be a function with a pole at -inf."""
    case = make_case(distribution="empty_rows", head_dim=16)
    given = case.output_gradients()
    expected = gradients(case, *given, backend=backend)
    empty = case.oracle[1] == -torch.inf
    assert empty.any()
    for x in given:
        x[empty] = torch.nan
    assert_same(gradients(case, *given, backend=backend), expected)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 30), (0, 0), (5, 0)])
def test_no_queries_or_no_keys_give_zeros(make_case, backend, dense, q_len, k_len):
    case = make_case(q_lens=(q_len,), k_lens=(k_len,), value_dim=24, dense=dense)
    for grad, x in zip(
        gradients(case, *case.output_gradients(), backend=backend), (case.q, case.k, case.v), strict=True
    ):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("dense", [False, True])
def test_a_second_derivative_is_refused_and_not_taken_for_zero(make_case, backend, dense):
    """In a penalty on the gradient there is a first derivative as well, which would hide it."""
    case = make_case(head_dim=16, dense=dense)
    operands = leaves(case)
    out, _ = answer(case, *operands, backend=backend)
    grads = torch.autograd.grad(out.sum(), operands, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (out.sum() + grads[0].square().sum()).backward()


@pytest.fixture
def kept():
    """The tensors that autograd keeps."""
    tensors = []

    def pack(x):
        tensors.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield tensors


def test_without_gradients_nothing_is_kept(make_case, kept):
    case = make_case(head_dim=16)
    assert not answer(case, case.q, case.k, case.v)[0].requires_grad
    with torch.no_grad():
        assert not answer(case, *leaves(case))[0].requires_grad
    with torch.inference_mode():
        attend(case.problem, *case.tensors)
    assert not kept


def test_inputs_and_answer_are_kept_and_nothing_else(make_case, kept):
    """No copy of what was given, nor anything that grows with the slots."""
    case = make_case(head_dim=16)
    operands = leaves(case)
    given = [*operands, *case.tensors[3:]]
    answers = answer(case, *operands, **{"cu_seqlens_q": given[4], "cu_seqlens_k": given[5]})
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*given, *answers)}


def answer_and_gradients(case, **options):
    """Forward and backward both where this is called."""
    q, k, v = leaves(case)
    out, lse = answer(case, q, k, v, **options)
    return out, lse, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("dense", [False, True], ids=["selected", "dense"])
def test_autocast_changes_nothing_of_an_operator(make_case, backend, dense):
    case = make_case(dtype=torch.float32, dense=dense)
    alone = answer_and_gradients(case, backend=backend)
    with torch.autocast(case.q.device.type, dtype=torch.bfloat16):
        within = answer_and_gradients(case, backend=backend)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(alone, within, strict=True))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["selected", "dense"])
def test_what_new_tensors_are_made_of_is_no_matter(make_case, backend, dense, default):
    case = make_case(dtype=torch.float32, dense=dense)
    alone = answer_and_gradients(case, backend=backend)
    torch.set_default_dtype(default)
    try:
        again = answer_and_gradients(case, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(alone, again, strict=True))

from dataclasses import replace

import pytest
import torch

from fsa_core.reference import (
    dense_attention_reference,
    selected_attention_reference,
    selected_attention_reference_backward,
)
from tests.fsa_core.conftest import DISTRIBUTIONS, visible_keys

SHAPES = {
    "one sequence": {"q_lens": (90,)},
    "packed, short last blocks, an empty sequence": {"q_lens": (37, 0, 70, 1)},
    "chunked prefill": {"q_lens": (20, 1), "k_lens": (90, 65)},
    "more queries than keys": {"q_lens": (40, 9), "k_lens": (30, 0)},
    "not causal": {"q_lens": (33, 20), "causal": False},
    "indices of one head": {"index_heads": 1},
    "indices of each query head": {"index_heads": 6, "group_size": 3},
}


def softmax_over_mask(case):
    """The same mathematics by another way: one dense mask over the whole packed call."""
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    mask = visible_keys(case)
    group = case.problem.group_size
    scores = torch.einsum("tkgd,skd->kgts", q.unflatten(1, (-1, group)), k).flatten(0, 1)
    weights = (scores * case.problem.softmax_scale).exp() * mask
    total = weights.sum(-1, keepdim=True)
    # Dividing by 0 would be undone in the answer, but not in its gradients.
    divisor = total.where(total > 0, 1.0)
    out = torch.einsum("kgts,skd->tkgd", (weights / divisor).unflatten(0, (-1, group)), v)
    return out.flatten(1, 2), divisor.log().where(total > 0, -torch.inf).squeeze(-1).T


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_selected_reference_is_a_softmax_over_the_selected_keys(make_case, shape, distribution):
    case = make_case(distribution=distribution, **shape)
    out, lse = selected_attention_reference(case.problem, *case.tensors)
    torch.testing.assert_close((out, lse), softmax_over_mask(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_selected_gradients_are_those_of_a_softmax_over_the_selected_keys(make_case, shape, distribution):
    case = make_case(distribution=distribution, **shape)
    given = [x.double() for x in case.output_gradients()]
    operands = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = operands
    answer = softmax_over_mask(replace(case, q=q, k=k, v=v))
    expected = torch.autograd.grad(answer, operands, given)
    got = selected_attention_reference_backward(case.problem, *case.tensors, *case.oracle, *given)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_reference_agrees_with_torch(make_case, device, causal):
    case = make_case(q_lens=(300,), dense=True, causal=causal, group_size=3)
    out, _ = dense_attention_reference(case.problem, *case.dense_tensors)
    q, k, v = (x.double().transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_selecting_every_block_is_dense_attention(make_case):
    sparse = make_case(q_lens=(60, 5), k_lens=(64, 40), num_slots=4, group_size=3)
    dense = make_case(q_lens=(60, 5), k_lens=(64, 40), dense=True, group_size=3)
    torch.testing.assert_close(sparse.oracle, dense.oracle, rtol=1e-12, atol=1e-12)


def test_tokens_without_keys_give_zero_and_minus_infinity(make_case):
    case = make_case(distribution="empty_rows")
    empty = (case.block_indices < 0).all(-1).repeat_interleave(case.problem.group_size, dim=0).T
    out, lse = case.oracle
    assert empty.any()
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_generated_rows_are_unique_visible_and_not_all_empty(make_case, distribution):
    case = make_case(distribution=distribution, q_lens=(100, 7), k_lens=(130, 7))
    for sequence, (start, end) in enumerate(((0, 100), (100, 107))):
        for i, token in enumerate(range(start, end)):
            own_block = ((130, 7)[sequence] - (end - start) + i) // 16
            for row in case.block_indices[:, token].tolist():
                ids = [block for block in row if block >= 0]
                assert len(set(ids)) == len(ids)
                assert all(block <= own_block for block in ids)
    assert (case.block_indices >= 0).any()


@pytest.mark.parametrize("poison", ["out", "lse"])
def test_the_bound_refuses_nan_and_a_wrong_token(make_case, assert_close_to_oracle, poison):
    case = make_case()
    right = [case.oracle[0].float(), case.oracle[1].float()]
    assert_close_to_oracle(*right, case)
    for bad in (torch.nan, 0.5, torch.inf):
        wrong = [x.clone() for x in right]
        wrong[("out", "lse").index(poison)][17, 1] += bad
        with pytest.raises(AssertionError):
            assert_close_to_oracle(*wrong, case)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_bound_on_gradients_refuses_nan_and_a_wrong_token(
    make_case, assert_gradients_close_to_oracle, which
):
    case = make_case()
    given = case.output_gradients()
    right = [x.float() for x in case.oracle_gradients(*given)]
    assert_gradients_close_to_oracle(right, case, *given)
    for bad in (torch.nan, 0.01, torch.inf):
        wrong = [x.clone() for x in right]
        wrong[which][17, 1] += bad
        with pytest.raises(AssertionError):
            assert_gradients_close_to_oracle(wrong, case, *given)


def test_the_bound_on_gradients_refuses_any_where_nothing_is_seen(
    make_case, assert_gradients_close_to_oracle
):
    case = make_case(distribution="empty_rows")
    given = case.output_gradients()
    grads = [x.float() for x in case.oracle_gradients(*given)]
    token, head = (case.oracle[1] == -torch.inf).nonzero()[0].tolist()
    grads[0][token, head, 0] = 1e-30
    with pytest.raises(AssertionError, match="a token without keys"):
        assert_gradients_close_to_oracle(grads, case, *given)

"""The gate agrees with torch's own derivatives, and notices what a benchmark must not be given for."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case, suite
from benchmarks.contenders import OUR_TOLERANCE
from benchmarks.gate import sampled_truth, worst_error
from benchmarks.inputs import Inputs, attended_pairs, make_inputs


def masked_attention(x: Inputs, mask: torch.Tensor, stage: str) -> tuple[torch.Tensor, ...]:
    """Eager attention in float64, and torch's gradients of it; mask [kv heads, tokens, keys]."""
    q, k, v = (t.double().requires_grad_() for t in (x.q, x.k, x.v))
    wide_k, wide_v, mask = (t.repeat_interleave(x.group_size, dim) for t, dim in ((k, 1), (v, 1), (mask, 0)))
    scores = torch.einsum("thd,shd->hts", q, wide_k) * x.softmax_scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("hts,shd->thd", weights, wide_v)
    return (out.detach(),) if stage == "forward" else torch.autograd.grad(out, (q, k, v), x.grad_out.double())


def causal_mask(x: Inputs, *, dense: bool) -> torch.Tensor:
    token = torch.arange(x.num_tokens)
    mask = (token <= token[:, None]).expand(x.k.shape[1], -1, -1)
    if dense:
        return mask
    return mask & (token // x.block_size == x.block_indices[..., None]).any(2)


@pytest.fixture(params=["random", "same"])
def case(request: pytest.FixtureRequest) -> Case:
    # 100 is not a multiple of the block: the last one is short.
    return replace(suite("smoke")[0], num_tokens=100, kind=request.param)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_the_gate_passes_what_torch_itself_computes(case: Case, stage: str, dense: bool) -> None:
    x = make_inputs(case, torch.device("cpu"))
    answer = masked_attention(x, causal_mask(x, dense=dense), stage)
    assert worst_error(answer, sampled_truth(x, stage, dense=dense)) < 1e-10


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_the_gate_notices_one_block_that_one_token_did_not_attend(case: Case, stage: str) -> None:
    x = make_inputs(case, torch.device("cpu"))
    mask = causal_mask(x, dense=False)
    mask[0, -1, : x.block_size] = False
    answer = masked_attention(x, mask, stage)
    assert worst_error(answer, sampled_truth(x, stage)) > OUR_TOLERANCE


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_gate_notices_a_row_that_is_nan_or_wrong(case: Case, number: int) -> None:
    x = make_inputs(case, torch.device("cpu"))
    answer = masked_attention(x, causal_mask(x, dense=False), "backward")
    answer[number][-1] = torch.nan
    assert not worst_error(answer, sampled_truth(x, "backward")) < 1.0
    answer[number][-1] = 1.0
    assert not worst_error(answer, sampled_truth(x, "backward")) < 1e-2


def test_pairs_are_those_of_the_mask(case: Case) -> None:
    x = make_inputs(case, torch.device("cpu"))
    assert attended_pairs(x) == causal_mask(x, dense=False).sum().item() * x.group_size

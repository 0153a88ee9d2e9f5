"""The gate agrees with torch's own derivatives, and notices what a benchmark must not be given for."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import STAGES, Case, Stage, suite
from benchmarks.contenders import OUR_TOLERANCE, PEER_TOLERANCE, Contender, contenders_of
from benchmarks.gate import Reach, sampled_truth, worst_error
from benchmarks.inputs import Inputs, attended_pairs, make_inputs


def masked_attention(x: Inputs, mask: torch.Tensor, stage: str) -> tuple[torch.Tensor, ...]:
    """Eager attention in float64, and torch's gradients of it; mask [kv heads, tokens, keys]."""
    q, k, v = (t.double().requires_grad_() for t in (x.q, x.k, x.v))
    wide_k, wide_v, mask = (t.repeat_interleave(x.group_size, dim) for t, dim in ((k, 1), (v, 1), (mask, 0)))
    scores = torch.einsum("thd,shd->hts", q, wide_k) * x.softmax_scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("hts,shd->thd", weights, wide_v)
    return (out.detach(),) if stage == "forward" else torch.autograd.grad(out, (q, k, v), x.grad_out.double())


def mask_of(x: Inputs, reach: Reach) -> torch.Tensor:
    token = torch.arange(x.num_tokens)
    if reach == "piece":
        piece = token // x.keys_of_row
        return (piece == piece[:, None]).repeat(x.k.shape[1], 1, 1)
    mask = (token <= token[:, None]).repeat(x.k.shape[1], 1, 1)
    if reach == "causal":
        return mask
    return mask & (token // x.block_size == x.block_indices[..., None]).any(2)


@pytest.fixture(params=["random", "same"])
def case(request: pytest.FixtureRequest) -> Case:
    # 100 is not a multiple of the block: the last one is short.
    return replace(suite("smoke")[0], num_tokens=100, kind=request.param)


@pytest.mark.parametrize("reach", ["selected", "causal", "piece"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_gate_passes_what_torch_itself_computes(case: Case, stage: Stage, reach: Reach) -> None:
    x = make_inputs(case, torch.device("cpu"))
    answer = masked_attention(x, mask_of(x, reach), stage)
    assert worst_error(answer, sampled_truth(x, stage, reach)) < 1e-10


@pytest.mark.parametrize("stage", STAGES)
def test_the_gate_notices_a_piece_without_one_of_its_blocks_or_with_one_too_many(
    case: Case, stage: Stage
) -> None:
    x = make_inputs(case, torch.device("cpu"))
    truth = sampled_truth(x, stage, "piece")
    without, beyond = (mask_of(x, "piece") for _ in range(2))
    without[0, : x.keys_of_row, x.block_size : 2 * x.block_size] = False
    beyond[0, : x.keys_of_row, x.keys_of_row :][:, : x.block_size] = True
    for mask in (without, beyond, mask_of(x, "piece").tril(), mask_of(x, "causal")):
        assert worst_error(masked_attention(x, mask, stage), truth) > PEER_TOLERANCE


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_the_gate_notices_one_block_that_one_token_did_not_attend(case: Case, stage: str) -> None:
    x = make_inputs(case, torch.device("cpu"))
    mask = mask_of(x, "selected")
    mask[0, -1, : x.block_size] = False
    answer = masked_attention(x, mask, stage)
    assert worst_error(answer, sampled_truth(x, stage)) > OUR_TOLERANCE


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_gate_notices_a_row_that_is_nan_or_wrong(case: Case, number: int) -> None:
    x = make_inputs(case, torch.device("cpu"))
    answer = masked_attention(x, mask_of(x, "selected"), "backward")
    answer[number][-1] = torch.nan
    assert not worst_error(answer, sampled_truth(x, "backward")) < 1.0
    answer[number][-1] = 1.0
    assert not worst_error(answer, sampled_truth(x, "backward")) < 1e-2


def test_pairs_are_those_of_the_mask(case: Case) -> None:
    x = make_inputs(case, torch.device("cpu"))
    assert attended_pairs(x) == mask_of(x, "selected").sum().item() * x.group_size


def of_pieces(case: Case, device: str) -> list[Contender]:
    return [c for c in contenders_of(case, torch.device(device), peers=None) if c.reach == "piece"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_gate_passes_torchs_attention_of_as_many_keys(stage: Stage) -> None:
    (case,) = [case for case in suite("smoke") if case.query_block_size > 1 and case.stage == stage]
    (contender,) = of_pieces(case, "cpu")
    x = make_inputs(case, torch.device("cpu"))
    answer = contender.settle(contender.prepare(x, stage)())
    assert worst_error(answer, sampled_truth(x, stage, "piece")) < 1e-5
    for reach in ("selected", "causal"):
        assert worst_error(answer, sampled_truth(x, stage, reach)) > PEER_TOLERANCE


def test_as_many_keys_are_attended_beside_shared_rows_in_whole_pieces_only() -> None:
    for case in suite("patterns"):
        names = [contender.name for contender in of_pieces(case, "cuda")]
        assert names == ["cuDNN at as many keys", "FlashAttention at as many keys"]
        assert not of_pieces(replace(case, num_tokens=case.num_tokens + case.block_size), "cuda")
        assert not of_pieces(replace(case, query_block_size=1), "cuda")

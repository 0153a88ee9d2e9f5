import pytest
import torch

from fsa_core import dense_backward
from fsa_core.api import dense_attention
from tests.fsa_core.conftest import LENGTHS

SHAPES = {
    **LENGTHS,
    "one sequence": {"q_lens": (300,)},
    "odd dims": {"head_dim": 36, "value_dim": 19},
}


@pytest.fixture
def check(make_case, assert_gradients_close_to_oracle):
    def run(**options):
        case = make_case(dense=True, group_size=3, **options)
        operands = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        given = case.output_gradients()
        grads = torch.autograd.grad(dense_attention(*operands, **case.options), operands, given)
        assert_gradients_close_to_oracle(grads, case, *given)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_any_shape(check, shape, causal, dtype):
    check(causal=causal, dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_stay_finite_and_right(check, dtype):
    check(dtype=dtype, q_scale=16.0, head_dim=128)


@pytest.mark.parametrize("causal", [True, False])
def test_a_few_rows_of_scores_at_a_time(check, monkeypatch, causal):
    monkeypatch.setattr(dense_backward, "SCORES_BYTES", 30_000)
    check(q_lens=(70, 33), k_lens=(100, 33), causal=causal)

import pytest
import torch

from fsa_core.api import dense_attention
from fsa_core.dense import dense_attention_forward
from tests.fsa_core.conftest import assert_close_to_oracle

SHAPES = {
    "one sequence": {"q_lens": (300,)},
    "packed": {"q_lens": (37, 0, 70, 1)},
    "chunked prefill": {"q_lens": (20, 1, 200), "k_lens": (90, 65, 201)},
    "more queries than keys": {"q_lens": (40, 9), "k_lens": (30, 0)},
    "no keys at all": {"q_lens": (5,), "k_lens": (0,)},
    "one query a sequence": {"q_lens": (1, 1), "k_lens": (50, 300), "group_size": 8},
    "odd dims": {"head_dim": 36, "value_dim": 19, "group_size": 3},
    "wide": {"head_dim": 256, "value_dim": 256, "group_size": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dense_attention_of_any_shape(make_case, shape, causal, dtype):
    case = make_case(dense=True, causal=causal, dtype=dtype, **shape)
    assert_close_to_oracle(*dense_attention(case.q, case.k, case.v, **case.options), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_stay_finite_and_right(make_case, dtype):
    case = make_case(dense=True, dtype=dtype, q_scale=16.0, head_dim=128)
    assert_close_to_oracle(*dense_attention(case.q, case.k, case.v, **case.options), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_bitwise_the_same_alone_and_in_any_company(make_case, dtype):
    q_lens, k_lens = (1, 33, 300, 0, 64, 1, 129), (77, 33, 301, 5, 200, 900, 129)
    shape = {"dense": True, "group_size": 3, "dtype": dtype}
    case = make_case(q_lens=q_lens, k_lens=k_lens, **shape)
    out, lse = dense_attention_forward(case.problem, *case.dense_tensors)
    starts_q, starts_k = case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist()
    for i, (len_q, len_k) in enumerate(zip(q_lens, k_lens, strict=True)):
        alone = make_case(q_lens=(len_q,), k_lens=(len_k,), **shape)
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        tensors = (case.q[rows], case.k[keys], case.v[keys], alone.cu_seqlens_q, alone.cu_seqlens_k)
        alone_out, alone_lse = dense_attention_forward(alone.problem, *tensors)
        assert torch.equal(out[rows], alone_out)
        assert torch.equal(lse[rows], alone_lse)

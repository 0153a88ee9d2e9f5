"""Gradients on the paths through query tiles against the oracle."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.backward_plan import plan_backward
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import MIXED, PATHS, QUERY_TILE
from tests.fsa_core.kernels.conftest import gradients


@pytest.fixture(params=[QUERY_TILE, MIXED])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def check(make_case: Callable, assert_gradients_close_to_oracle: Callable, path: str) -> Callable:
    def run(**options: object) -> None:
        case = make_case(**{"dtype": torch.float16, "head_dim": 32} | options)
        grads, given = gradients(case, path=path)
        assert_gradients_close_to_oracle(grads, case, *given)

    return run


# Tiles of 64, 21 and 2 tokens.
@pytest.mark.parametrize("group_size", [1, 3, 32])
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(q_lens=(33,), group_size=group_size, num_kv_heads=1, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 80), (192, 128), (16, 256)])
def test_head_dims_that_are_no_powers_of_two_and_values_of_another_width(
    check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    check(q_lens=(33,), num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", [64, 256])
def test_blocks_of_one_part_and_of_several_with_a_short_last_block(check: Callable, block_size: int) -> None:
    check(q_lens=(20,), k_lens=(2 * block_size + 7,), num_kv_heads=1, block_size=block_size)


@pytest.mark.parametrize("distribution", ["local", "ragged", "empty_rows"])
def test_blocks_that_all_choose_that_few_choose_and_that_nobody_does(
    check: Callable, distribution: str
) -> None:
    check(q_lens=(30, 13), distribution=distribution, group_size=1)


def test_all_keys_of_the_blocks_without_a_causal_mask(check: Callable) -> None:
    check(q_lens=(30, 13), causal=False)


@pytest.mark.parametrize("index_heads", [1, 6])
def test_blocks_chosen_for_all_heads_or_for_a_query_head(check: Callable, index_heads: int) -> None:
    check(q_lens=(30,), group_size=3, index_heads=index_heads)


def test_packed_sequences_of_any_length(check: Callable) -> None:
    check(q_lens=(1, 0, 17, 5, 0), k_lens=(70, 9, 17, 64, 0))


def test_queries_before_the_first_key_see_nothing(check: Callable) -> None:
    check(q_lens=(30,), k_lens=(17,))


def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(q_lens=(33,), q_scale=16.0, head_dim=64, dtype=dtype)


def test_float32(check: Callable) -> None:
    check(q_lens=(33,), dtype=torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_heads_whose_deltas_do_not_fit_together_are_taken_one_after_another(
    make_case: Callable, assert_gradients_close_to_oracle: Callable, path: str
) -> None:
    case = make_case(q_lens=(20,), head_dim=16, dtype=torch.float16)
    plan = plan_backward(case.problem, 2000, path)
    assert plan.delta_heads < case.problem.num_kv_heads
    grads, given = gradients(case, path=path, workspace_limit_bytes=2000)
    assert_gradients_close_to_oracle(grads, case, *given)


def test_ids_that_no_validation_has_seen_touch_no_foreign_memory(
    make_case: Callable, assert_gradients_close_to_oracle: Callable, path: str
) -> None:
    case = make_case(q_lens=(40, 24), distribution="ragged", dtype=torch.float16, head_dim=32)
    ids = case.block_indices
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 4], dtype=torch.int32, device=ids.device)
    wild = wild[torch.arange(ids.numel(), device=ids.device) % 4].view_as(ids)
    tensors = (*case.tensors[:3], torch.where(ids == -1, wild, ids), *case.tensors[4:])
    answer, given = selected_attention_forward(case.problem, *tensors), case.output_gradients()
    grads = selected_attention_backward(case.problem, *tensors, *answer, *given, path=path)
    assert_gradients_close_to_oracle(grads, case, *given)


def test_a_request_alone_gives_the_bits_it_has_in_company(
    make_case: Callable, device: torch.device, path: str
) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    lens = torch.randint(1, 300, (30,)).tolist()
    company = make_case(q_lens=lens, dtype=torch.bfloat16, distribution="local")
    grads, given = gradients(company, path=path)
    starts = company.cu_seqlens_q.tolist()
    for i, length in enumerate(lens):
        rows = slice(starts[i], starts[i + 1])
        problem = replace(company.problem, num_q_tokens=length, num_k_tokens=length, num_sequences=1)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
        operands = (company.q[rows], company.k[rows], company.v[rows])
        tensors = (*operands, company.block_indices[:, rows].contiguous(), cu_seqlens, cu_seqlens)
        answer = selected_attention_forward(problem, *tensors)
        alone = selected_attention_backward(problem, *tensors, *answer, *(x[rows] for x in given), path=path)
        for got, expected in zip(alone, grads, strict=True):
            assert torch.equal(got, expected[rows]), f"request {i}: {length} tokens"

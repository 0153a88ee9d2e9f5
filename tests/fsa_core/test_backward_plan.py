from dataclasses import replace

import pytest
import torch
from hypothesis import given

from fsa_core.backward_plan import plan_backward
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, padded_dim
from fsa_core.problem import Problem
from tests.fsa_core.test_plan import problems

PROBLEM = Problem(
    num_q_tokens=65536,
    num_k_tokens=65536,
    num_sequences=1,
    num_q_heads=16,
    num_kv_heads=4,
    head_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    index_heads=4,
    num_slots=16,
    block_size=64,
    causal=True,
    softmax_scale=128**-0.5,
)


def problem(tokens: int, group_size: int = 4, **changes: object) -> Problem:
    sizes = {"num_q_tokens": tokens, "num_k_tokens": tokens, "num_q_heads": 4 * group_size}
    return replace(PROBLEM, **sizes, **changes)


@given(problems())
def test_the_workspace_is_bounded_at_any_length(problem: Problem) -> None:
    assert 0 < plan_backward(problem).workspace_bytes <= DEFAULT_WORKSPACE_BYTES


def test_short_calls_compute_scores_once_and_long_ones_do_not_rewrite_all_keys_each_chunk() -> None:
    short, long = plan_backward(problem(8192, 1)), plan_backward(problem(65536))
    assert [(one.with_keys, one.with_queries) for one in short.passes] == [(True, True)]
    assert [(one.with_keys, one.with_queries) for one in long.passes] == [(True, False), (False, True)]
    assert long.passes[0].chunk_tokens > long.passes[1].chunk_tokens


def test_gradients_of_more_keys_than_fit_are_taken_in_ranges() -> None:
    plan = plan_backward(problem(2**20))
    assert plan.range_segments < plan.segments
    assert len(plan.passes) == 2


def test_every_split_item_has_a_place() -> None:
    plan = plan_backward(problem(32768))
    for one in plan.passes:
        pairs = one.chunk_tokens * PROBLEM.num_slots
        # The most items that segments of two or more can have: as many segments of just over one item.
        assert one.max_splits >= 2 * (pairs // (one.pairs_per_item + 1))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_a_tiles_keys_fit_the_registers(head_dim: int, dtype: torch.dtype) -> None:
    plan = plan_backward(problem(8192, head_dim=head_dim, dtype=dtype))
    accumulators = plan.tile_keys * 2 * padded_dim(head_dim) // (32 * plan.num_warps)
    assert accumulators <= 128

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fsa_core.backward_plan import QUERY_ROWS, plan_backward
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR, MIXED, PATHS, QUERY_TILE, takes
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim
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


@given(problems(), st.sampled_from(PATHS), st.sampled_from((QUERY_ROWS, 128)))
def test_the_workspace_is_bounded_at_any_length(problem: Problem, path: str, query_rows: int) -> None:
    assume(takes(problem, path))
    plan = plan_backward(problem, path=path, query_rows=query_rows)
    assert 0 < plan.workspace_bytes <= DEFAULT_WORKSPACE_BYTES


def test_short_calls_compute_scores_once_and_long_ones_do_not_rewrite_all_keys_each_chunk() -> None:
    short, long = plan_backward(problem(8192)), plan_backward(problem(65536))
    assert short.keys.with_queries
    assert short.queries is None
    assert not long.keys.with_queries
    assert long.queries.path == KV_MAJOR
    assert not long.keys.has_sums
    assert long.keys.chunk_tokens == 65536


def test_query_tiles_need_no_shares_of_the_gradient_of_q() -> None:
    plan = plan_backward(problem(8192), path=QUERY_TILE)
    assert not plan.keys.with_queries
    assert not plan.queries.has_partials


def test_query_tiles_have_the_rows_that_their_kernel_takes_and_pairs_have_theirs() -> None:
    usual, larger = (plan_backward(problem(8192), path=MIXED, query_rows=rows) for rows in (QUERY_ROWS, 128))
    assert [(x.queries.query_tile.rows, x.queries.query_tile.tokens) for x in (usual, larger)] == [
        (64, 16),
        (128, 32),
    ]
    assert usual.queries.tile == larger.queries.tile


@pytest.mark.parametrize(("query_block_size", "rows"), [(16, 64), (32, 128), (64, 128)])
def test_a_query_tile_that_lies_in_one_row_of_indices_stays_there(query_block_size: int, rows: int) -> None:
    sharing = problem(8192, query_block_size=query_block_size)
    tile = plan_backward(sharing, path=QUERY_TILE, query_rows=128).queries.query_tile
    assert tile.is_row
    assert tile.rows == rows


def test_all_heads_of_a_short_call_are_indexed_and_taken_together() -> None:
    keys = plan_backward(problem(8192), path=QUERY_TILE).keys
    assert keys.kv_heads == keys.launch_heads == 4


def test_items_are_of_one_size_up_to_131072_tokens_and_longer_after() -> None:
    """What the bits of grad_k and grad_v hang on, beside the tiles."""
    lengths = (8192, 2**17, 2**18, 2**19, 2**20)
    keys = [plan_backward(problem(tokens), path=QUERY_TILE).keys for tokens in lengths]
    assert [x.pairs_per_item for x in keys] == [2048, 2048, 4096, 16384, 32768]
    assert plan_backward(problem(8192)).keys.pairs_per_item == 2048


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_million_tokens_are_indexed_once(group_size: int) -> None:
    keys = plan_backward(problem(2**20, group_size)).keys
    assert keys.chunk_tokens == 2**20
    assert not keys.has_sums


def test_gradients_of_more_keys_than_fit_are_taken_in_ranges() -> None:
    plan = plan_backward(problem(2**20, group_size=16))
    assert plan.keys.range_segments < plan.segments
    assert plan.keys.has_sums


def test_every_split_item_has_a_place() -> None:
    keys = plan_backward(problem(32768)).keys
    pairs = keys.chunk_tokens * PROBLEM.num_slots
    # The most items that segments of two or more can have: as many segments of just over one item.
    assert keys.max_splits >= 2 * (pairs // (keys.pairs_per_item + 1))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_a_tiles_keys_fit_the_registers(head_dim: int, dtype: torch.dtype) -> None:
    keys = plan_backward(problem(8192, head_dim=head_dim, dtype=dtype)).keys
    accumulators = keys.tile_keys * 2 * padded_dim(head_dim) // (32 * keys.num_warps)
    assert accumulators <= 128

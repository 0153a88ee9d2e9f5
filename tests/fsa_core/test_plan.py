"""The plan of the forward pass: bounded whatever the length, complete, and cheap to make."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fsa_core.plan import (
    DEFAULT_WORKSPACE_BYTES,
    MAX_CHUNK_TOKENS,
    MIXED,
    PATHS,
    QUERY_TILE,
    chunks,
    groups,
    plan_forward,
)
from fsa_core.problem import BLOCK_SIZES, Problem


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads = draw(st.integers(1, 8))
    q_heads = kv_heads * draw(st.integers(1, 16))
    num_k_tokens = draw(st.integers(1, 1 << 20))
    return Problem(
        num_q_tokens=draw(st.integers(1, num_k_tokens)),
        num_k_tokens=num_k_tokens,
        num_sequences=draw(st.integers(1, 64)),
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(16, 256)),
        value_dim=draw(st.integers(16, 256)),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float32))),
        index_heads=draw(st.sampled_from((1, kv_heads, q_heads))),
        num_slots=draw(st.integers(1, 64)),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        causal=True,
        softmax_scale=0.1,
    )


@given(problems(), st.sampled_from(PATHS))
def test_a_million_tokens_stay_within_the_default_workspace(problem: Problem, path: str) -> None:
    assert 0 < plan_forward(problem, path=path).workspace_bytes <= DEFAULT_WORKSPACE_BYTES


@given(problems(), st.sampled_from((0, 2**20, DEFAULT_WORKSPACE_BYTES)), st.sampled_from(PATHS))
def test_every_token_meets_every_head_once(problem: Problem, limit_bytes: int, path: str) -> None:
    problem = Problem(**{**_fields(problem), "num_q_tokens": min(problem.num_q_tokens, 300)})
    plan = plan_forward(problem, limit_bytes, path)
    assert plan.chunk_tokens <= MAX_CHUNK_TOKENS
    met = torch.zeros(plan.tile_heads, problem.num_q_tokens, dtype=torch.int32)
    for group in groups(problem, plan):
        for c in chunks(plan, group):
            assert c.number < plan.group_chunks
            assert c.first_token == group.first_token + c.number * plan.chunk_tokens
            met[c.first_head : c.first_head + c.num_heads, c.first_token : c.first_token + c.num_tokens] += 1
    assert bool((met == 1).all())


@given(problems())
def test_the_work_items_of_any_choice_of_blocks_fit_the_launch(problem: Problem) -> None:
    plan = plan_forward(problem)
    pairs = plan.chunk_tokens * problem.num_slots
    rows_per_item = plan.tile.rows * plan.tile.tiles_per_item
    # The two extremes: one block has all pairs, or as many segments as can be have one pair more than fills.
    assert -(-pairs * plan.heads_per_pair // rows_per_item) <= plan.max_items
    segments = min(plan.segments, pairs)
    even = -(-(pairs // segments) * plan.heads_per_pair // rows_per_item)
    assert segments * even <= plan.max_items + segments


def _fields(problem: Problem) -> dict[str, object]:
    return {name: getattr(problem, name) for name in problem.__slots__}


@given(problems(), st.sampled_from((QUERY_TILE, MIXED)))
def test_a_query_tile_holds_its_rows_its_masks_and_its_keys(problem: Problem, path: str) -> None:
    plan = plan_forward(problem, path=path)
    tile = plan.query_tile
    assert tile is not None
    assert tile.tokens * plan.heads_per_pair <= tile.rows
    assert tile.tokens <= 64
    slots = 1 << (problem.num_slots - 1).bit_length()
    tokens = 1 << (tile.tokens - 1).bit_length()
    assert tokens * slots * (problem.num_k_tokens // problem.block_size + 1) <= 2**31
    # Every pair that is not alone in its tile could be shared.
    assert tile.max_shared * tile.min_tokens <= tile.tokens * problem.num_slots

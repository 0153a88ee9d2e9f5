"""The plan of the forward pass: bounded whatever the length, complete, and cheap to make."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsa_core.plan import (
    DEFAULT_WORKSPACE_BYTES,
    KV_MAJOR,
    MAX_CHUNK_TOKENS,
    MIXED,
    PATHS,
    QUERY_TILE,
    TOKEN_MAJOR,
    chunks,
    groups,
    plan_forward,
    workspace_bytes,
)
from fsa_core.problem import BLOCK_SIZES, Problem
from fsa_core.tiles import PartialTuning, SharedTuning, Tuning


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


ROWS = st.sampled_from((16, 32, 64, 128, 256))
WARPS, SMALL = st.just(4), st.integers(1, 64)
TUNINGS = st.builds(
    Tuning,
    st.builds(PartialTuning, rows=ROWS, tiles_per_item=SMALL, num_warps=WARPS, max_registers=st.just(144)),
    st.builds(
        SharedTuning,
        rows=ROWS,
        num_warps=WARPS,
        max_registers=st.just(255),
        num_stages=st.just(2),
        shared_by=SMALL,
    ),
)


BUFFERS = st.sampled_from((1, 2))


@given(problems(), st.sampled_from(PATHS), BUFFERS)
def test_a_million_tokens_stay_within_the_default_workspace(
    problem: Problem, path: str, buffers: int
) -> None:
    assert 0 < plan_forward(problem, path=path, buffers=buffers).workspace_bytes <= DEFAULT_WORKSPACE_BYTES


@given(
    problems(),
    st.sampled_from(PATHS),
    TUNINGS,
    st.sampled_from((0, 2**20, DEFAULT_WORKSPACE_BYTES)),
    st.booleans(),
    BUFFERS,
)
def test_what_is_admitted_covers_every_path_however_tuned(
    problem: Problem, path: str, tuning: Tuning, limit_bytes: int, is_short: bool, buffers: int
) -> None:
    if is_short:
        problem = replace(problem, num_q_tokens=min(problem.num_q_tokens, 2000), num_k_tokens=4000)
    plan = plan_forward(problem, limit_bytes, path, tuning, buffers)
    assert plan.workspace_bytes <= workspace_bytes(problem, limit_bytes)


def test_what_is_admitted_is_little_more_than_is_taken() -> None:
    shape = {"num_q_heads": 16, "num_kv_heads": 4, "head_dim": 128, "value_dim": 128, "index_heads": 4}
    rest = {"num_slots": 16, "block_size": 64, "causal": True, "softmax_scale": 0.1, "dtype": torch.bfloat16}
    short = Problem(num_q_tokens=1024, num_k_tokens=1024, num_sequences=1, **shape, **rest)
    assert workspace_bytes(short) <= 1.1 * plan_forward(short).workspace_bytes
    long = replace(short, num_q_tokens=2**20, num_k_tokens=2**20)
    assert workspace_bytes(long) == DEFAULT_WORKSPACE_BYTES


@pytest.mark.parametrize("path", [QUERY_TILE, MIXED, TOKEN_MAJOR])
@pytest.mark.parametrize("num_slots", [16, 4096])
def test_a_path_that_cannot_take_a_problem_says_which_can(path: str, num_slots: int) -> None:
    """2 ** 31 places for a block, a token and a slot together."""
    blocks = 2**31 // max(1024, num_slots)
    problem = Problem(64, 16 * blocks, 1, 4, 1, 64, 64, torch.bfloat16, 1, num_slots, 16, True, 0.1)
    with pytest.raises(ValueError, match=f"path '{path}' .* cannot take .*'kv_major' can"):
        plan_forward(problem, path=path)
    plan_forward(problem, path=KV_MAJOR)
    plan_forward(replace(problem, num_k_tokens=16 * (blocks - 2)), path=path)


@given(problems(), st.sampled_from((0, 2**20, DEFAULT_WORKSPACE_BYTES)), st.sampled_from(PATHS), BUFFERS)
def test_every_token_meets_every_head_once(
    problem: Problem, limit_bytes: int, path: str, buffers: int
) -> None:
    problem = replace(problem, num_q_tokens=min(problem.num_q_tokens, 300))
    plan = plan_forward(problem, limit_bytes, path, buffers=buffers)
    assert plan.chunk_tokens <= MAX_CHUNK_TOKENS
    met = torch.zeros(plan.tile_heads, problem.num_q_tokens, dtype=torch.int32)
    for group in groups(problem, plan):
        for c in chunks(plan, group):
            assert c.number < plan.group_chunks
            assert c.first_token == group.first_token + c.number * plan.chunk_tokens
            met[c.first_head : c.first_head + c.num_heads, c.first_token : c.first_token + c.num_tokens] += 1
    assert bool((met == 1).all())


@given(problems(), BUFFERS)
def test_the_work_items_of_any_choice_of_blocks_fit_the_launch(problem: Problem, buffers: int) -> None:
    plan = plan_forward(problem, buffers=buffers)
    pairs = plan.chunk_tokens * problem.num_slots
    # The two extremes: one block has all pairs, or as many segments as can be have one pair more than fills.
    assert -(-pairs // plan.tile.pairs_per_item) <= plan.max_items
    segments = min(plan.segments, pairs)
    even = -(-(pairs // segments) // plan.tile.pairs_per_item)
    assert segments * even <= plan.max_items + segments


@given(problems(), st.sampled_from((QUERY_TILE, MIXED, TOKEN_MAJOR)), TUNINGS)
def test_a_query_tile_holds_its_rows_its_masks_and_its_keys(
    problem: Problem, path: str, tuning: Tuning
) -> None:
    plan = plan_forward(problem, path=path, tuning=tuning)
    tile = plan.query_tile
    assert tile is not None
    assert tile.tokens * plan.heads_per_pair <= tile.rows
    assert tile.tokens <= 64
    slots = 1 << (problem.num_slots - 1).bit_length()
    tokens = 1 << (tile.tokens - 1).bit_length()
    assert tokens * slots * (problem.num_k_tokens // problem.block_size + 1) <= 2**31
    pairs = tile.tokens * problem.num_slots
    assert pairs // tile.min_tokens <= tile.max_shared <= pairs

"""The buffers that calls really take, on any GPU, against what their plans say."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fsa_core.backward_plan import plan_backward
from fsa_core.kernels import hopper, replay
from fsa_core.kernels.agreement import new_agreement
from fsa_core.kernels.key_gradients import Call, Workspace
from fsa_core.kernels.partials import new_partials
from fsa_core.kernels.query_gradients import QueryGradients
from fsa_core.kernels.replay import BUFFER_ALIGNMENT, Memory
from fsa_core.plan import (
    DEFAULT_WORKSPACE_BYTES,
    PATHS,
    QUERY_TILE,
    plan_forward,
    takes,
    workspace_bytes,
)
from fsa_core.problem import Problem
from fsa_core.sizes import FLOAT32_BYTES
from fsa_core.tiles import Tuning, default_tuning
from tests.fsa_core.test_plan import TUNINGS, problems


@st.composite
def packed_problems(draw: st.DrawFn) -> Problem:
    """Of more sequences than requests have on the mean: each may take tiles of its own."""
    problem = draw(problems())
    return replace(problem, num_sequences=draw(st.integers(1, 4096)), dtype=torch.float16)


@contextmanager
def buffers_alone(*, on_hopper: bool) -> Iterator[None]:
    """Buffers are made and not cleared, as on a GPU of one kind or another."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(hopper, "runs_on", lambda _device: on_hopper)
        patches.setattr(replay, "clear", lambda _x: None)
        yield


def new_memory() -> Memory:
    return Memory(torch.empty(0, device="meta", dtype=torch.float16))


def bytes_of(memory: Memory) -> int:
    return sum(x.nbytes for x in memory.buffers)


def slack_of(memory: Memory) -> int:
    """What lies between buffers."""
    return BUFFER_ALIGNMENT * len(memory.buffers)


# Each of its tiles has a joint list for itself.
MANY_SEQUENCES = Problem(
    num_q_tokens=2, num_k_tokens=4096, num_sequences=500, num_q_heads=16, num_kv_heads=16, head_dim=64,
    value_dim=64, dtype=torch.float16, index_heads=16, num_slots=16, block_size=64, causal=True,
    softmax_scale=0.125,
)  # fmt: skip


@example(MANY_SEQUENCES, QUERY_TILE, default_tuning(MANY_SEQUENCES), True)
@given(packed_problems(), st.sampled_from(PATHS), TUNINGS, st.booleans())
def test_a_forward_pass_takes_what_its_plan_says(
    problem: Problem, path: str, tuning: Tuning, on_hopper: bool
) -> None:
    assume(takes(problem, path))
    plan = plan_forward(problem, path=path, tuning=tuning, buffers=1 + on_hopper)
    memory = new_memory()
    with buffers_alone(on_hopper=on_hopper):
        if plan.query_tile is not None:
            new_agreement(problem, plan, plan.query_tile, memory)
        if plan.has_partials:
            new_partials(problem, plan, memory)
    assert bytes_of(memory) <= plan.workspace_bytes
    assert plan.workspace_bytes <= workspace_bytes(problem) + slack_of(memory)


@given(packed_problems(), st.sampled_from(PATHS), TUNINGS, st.booleans())
def test_a_backward_pass_takes_what_its_plan_says(
    problem: Problem, path: str, tuning: Tuning, on_hopper: bool
) -> None:
    p = problem
    assume(takes(p, path))
    plan = plan_backward(p, path=path, tuning=tuning, buffers=1 + on_hopper)
    new = new_memory().like.new_empty
    q, k = new(p.num_q_tokens, p.num_q_heads, p.head_dim), new(p.num_k_tokens, p.num_kv_heads, p.head_dim)
    v, out = new(*k.shape[:2], p.value_dim), new(*q.shape[:2], p.value_dim)
    rows, starts = new(p.index_heads, p.num_q_tokens, p.num_slots), new(p.num_sequences + 1)
    delta = new(p.num_q_tokens, plan.delta_heads * p.group_size, dtype=torch.float32)
    kv_heads = range(plan.delta_heads)
    call = Call.of(p, plan, kv_heads, (q, k, v, rows, starts, starts, out, delta, out, q, k, v), delta, None)
    keys, queries = new_memory(), new_memory()
    with buffers_alone(on_hopper=on_hopper):
        Workspace.of(call, keys)
        if plan.queries is not None:
            heads = range(plan.delta_heads * plan.tile_heads_per_kv_head)
            QueryGradients(p, plan.queries, heads, call.given, rows, q, queries)
    both = (bytes_of(keys), bytes_of(queries))
    assert delta.numel() * FLOAT32_BYTES + (sum(both) if plan.at_once else max(both)) <= plan.workspace_bytes


@pytest.mark.parametrize("limit_bytes", [DEFAULT_WORKSPACE_BYTES, 1 << 26])
@given(problem=packed_problems(), path=st.sampled_from(PATHS))
def test_both_parts_of_a_backward_pass_at_once_are_within_the_limit(
    limit_bytes: int, problem: Problem, path: str
) -> None:
    assume(takes(problem, path))
    plan = plan_backward(problem, limit_bytes, path=path)
    assume(plan.at_once and plan.queries is not None)
    delta_bytes = FLOAT32_BYTES * problem.num_q_tokens * plan.delta_heads * problem.group_size
    room = max(limit_bytes - delta_bytes, limit_bytes // 2)
    assert plan.keys.workspace_bytes + plan.queries.workspace_bytes <= room

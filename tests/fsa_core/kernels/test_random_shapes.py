"""Whole problems drawn at random, forward and backward on every path, against the oracle.

The suite draws a few; ``make test-shapes`` draws a thousand. On a GPU each shape compiles kernels of its own;
on the CPU half of the problems go to the kernels for Hopper alone, interpreted.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fsa_core import backward_plan
from fsa_core.backward_plan import plan_backward
from fsa_core.kernels import backward
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, PATHS, ForwardPlan, chunks, groups, plan_forward
from fsa_core.problem import BLOCK_SIZES, MAX_HEAD_DIM, MIN_HEAD_DIM, Problem
from tests.fsa_core.conftest import DISTRIBUTIONS, Case, sharing_rows
from tests.gluon_interpreter import interpreted

PROGRESS_EVERY = 25
# Of as few numbers as are drawn here, the largest error of eager attention is small by luck now and then.
FACTOR = 4.0
# The interpreter takes ten milliseconds for a program.
MAX_PROGRAMS = 16


@dataclass(frozen=True)
class Draw:
    """A case as ``make_case`` takes it, how many queries share a row, and what the plans are told.

    ``on_hopper``: heads and blocks are of sizes that kernels for Hopper alone take.
    """

    options: dict[str, Any]
    on_hopper: bool
    query_block_size: int
    path: str
    workspace_limit_bytes: int
    item_pairs: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    kv_heads = draw(st.integers(1, 2))
    group_size = draw(st.integers(1, 8) | st.sampled_from((12, 16, 33)))
    q_heads = kv_heads * group_size
    on_hopper = draw(st.booleans())
    dtypes = (torch.float16, torch.bfloat16) + (() if on_hopper else (torch.float32,))
    dtype = draw(st.sampled_from(dtypes))
    # In float32 the keys of a program are few, and the programs of a large block many.
    block_sizes = [size for size in BLOCK_SIZES if size >= 64 or not on_hopper]
    block_size = draw(st.sampled_from(block_sizes[:3] if dtype == torch.float32 else block_sizes))
    most = max(32 // q_heads, 2)
    q_lens = draw(st.lists(st.integers(0, most), max_size=2))
    q_lens.insert(draw(st.integers(0, len(q_lens))), draw(st.integers(1, most)))
    more_keys = st.integers(-20, 0) | st.integers(0, block_size + 20)
    k_lens = [max(0, n + draw(more_keys)) for n in q_lens]
    dims = st.integers(MIN_HEAD_DIM, MAX_HEAD_DIM) | st.sampled_from((16, 64, 80))
    dims = st.sampled_from((64, 128)) if on_hopper else dims
    head_dim = draw(dims)
    options = {
        "q_lens": q_lens,
        "k_lens": k_lens,
        "num_kv_heads": kv_heads,
        "group_size": group_size,
        "index_heads": draw(st.sampled_from((1, kv_heads, q_heads) if q_heads <= 3 else (1, kv_heads))),
        "head_dim": head_dim,
        "value_dim": draw(st.just(head_dim) | dims),
        "dtype": dtype,
        "block_size": block_size,
        "num_slots": draw(st.integers(1, 8) | st.integers(1, 40)),
        "distribution": draw(st.sampled_from(DISTRIBUTIONS)),
        "causal": draw(st.booleans()),
        "q_scale": draw(st.sampled_from((1.0, 0.0, 4.0, 16.0))),
        "softmax_scale": draw(st.none() | st.floats(0.01, 1.0)),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Draw(
        options,
        on_hopper,
        query_block_size=draw(st.just(1) | st.sampled_from((2, 16, 64))),
        path=draw(st.sampled_from(PATHS)),
        workspace_limit_bytes=draw(
            st.sampled_from((DEFAULT_WORKSPACE_BYTES, 1)) | st.integers(1 << 10, 1 << 20)
        ),
        item_pairs=draw(st.sampled_from((backward_plan.ITEM_PAIRS, 1))),
    )


def num_programs(problem: Problem, path: str, limit_bytes: int) -> int:
    """How many programs of the kernels with matrix products run, forward and backward."""
    plan = plan_backward(problem, limit_bytes, path)
    count = _num_forward_programs(problem, plan_forward(problem, limit_bytes, path))
    if plan.queries is not None:
        count += _num_forward_programs(problem, plan.queries)
    keys = plan.keys
    ranges = -(-plan.segments // keys.range_segments)
    launches = ranges * -(-problem.num_q_tokens // keys.chunk_tokens) * plan.tile_heads_per_kv_head
    parts = problem.block_size // keys.tile_keys
    return count + launches * problem.num_kv_heads * parts * (keys.max_items + 2)


def _num_forward_programs(problem: Problem, plan: ForwardPlan) -> int:
    count = 0
    for group in groups(problem, plan):
        count += group.num_heads * plan.group_tiles
        count += sum(c.num_heads * (plan.max_items + 1) for c in chunks(plan, group))
    return count


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Says now and then how many problems were drawn, where they are many."""
    total, count = request.config.getoption("--shapes"), 0
    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def one_more() -> None:
        nonlocal count
        count += 1
        if count % PROGRESS_EVERY == 0 and total > PROGRESS_EVERY:
            with capture.global_and_fixture_disabled():
                terminal.write(f"\n{count} of {total} problems", flush=True)

    return one_more


@settings.get_profile("shapes")
@given(draws())
def test_any_problem_has_the_answer_and_the_gradients_of_the_oracle(
    device: torch.device,
    make_case: Callable[..., Case],
    assert_close_to_oracle: Callable[..., None],
    assert_gradients_close_to_oracle: Callable[..., None],
    progress: Callable[[], None],
    drawn: Draw,
) -> None:
    progress()
    options = dict(drawn.options)
    if device.type == "cpu" and options["dtype"] == torch.bfloat16:
        # The interpreter's tl.dot is wrong for it.
        options["dtype"] = torch.float16
    case = make_case(**options)
    if drawn.query_block_size > 1:
        case = sharing_rows(case, drawn.query_block_size)
    given_gradients = case.output_gradients()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as kernels:
        if drawn.on_hopper and device.type == "cpu":
            kernels.enter_context(interpreted())
        patch.setattr(backward_plan, "ITEM_PAIRS", drawn.item_pairs)
        patch.setattr(backward_plan, "LONG_ITEM_PAIRS", 2 * drawn.item_pairs)
        # Plans are remembered; those made with other constants must not be.
        backward.planned.cache_clear()
        limit_bytes = drawn.workspace_limit_bytes
        while limit_bytes < DEFAULT_WORKSPACE_BYTES:
            if num_programs(case.problem, drawn.path, limit_bytes) <= MAX_PROGRAMS:
                break
            limit_bytes *= 2
        note(f"{case.problem}, {limit_bytes=}")
        limit = {"workspace_limit_bytes": limit_bytes}
        answer = selected_attention_forward(case.problem, *case.tensors, path=drawn.path, **limit)
        assert_close_to_oracle(*answer, case, factor=FACTOR)
        given = (*answer, *given_gradients)
        grads = selected_attention_backward(case.problem, *case.tensors, *given, path=drawn.path, **limit)
    backward.planned.cache_clear()
    assert_gradients_close_to_oracle(grads, case, *given_gradients, factor=FACTOR)

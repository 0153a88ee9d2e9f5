"""What the kernels count and multiply in 32 bits fits, whatever the problem and whatever the workspace.

Each bound is that of a product that a kernel forms in int32; the others are formed in int64.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fsa_core.backward_plan import plan_backward
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, PATHS, counter_ints, plan_forward, takes
from fsa_core.problem import BLOCK_SIZES, MAX_SLOTS, Problem

MILLION = 1 << 20
WORKSPACES = (0, 2**20, DEFAULT_WORKSPACE_BYTES, 2**37)


@st.composite
def large_problems(draw: st.DrawFn, slots: tuple[int, ...] = (1, 16, 100, 1024)) -> Problem:
    kv_heads, q_heads = draw(st.sampled_from(((1, 1), (1, 128), (2, 6), (8, 128), (32, 512), (128, 128))))
    return Problem(
        num_q_tokens=draw(st.sampled_from((1, 100, 65536, MILLION))),
        num_k_tokens=draw(st.sampled_from((0, 65536, MILLION))),
        num_sequences=draw(st.sampled_from((1, 64, 65536))),
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((16, 128, 256))),
        value_dim=draw(st.sampled_from((16, 128, 256))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float32))),
        index_heads=draw(st.sampled_from((1, kv_heads, q_heads))),
        num_slots=draw(st.sampled_from(slots)),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        causal=True,
        softmax_scale=0.1,
    )


@settings(max_examples=500)
@given(
    large_problems((1, 16, 100, MAX_SLOTS)),
    st.sampled_from(WORKSPACES),
    st.sampled_from(PATHS),
    st.sampled_from((1, 2)),
)
def test_forward(problem: Problem, limit_bytes: int, path: str, buffers: int) -> None:
    p = problem
    assume(takes(p, path))
    plan = plan_forward(p, limit_bytes, path, buffers=buffers)
    index_heads = plan.group_heads if plan.index_per_head else 1
    rows = index_heads * plan.group_chunks
    numbers = {
        "rows of q and out in a chunk": plan.chunk_tokens * p.num_q_heads * max(p.head_dim, p.value_dim)
    }
    if plan.has_partials:
        partials = plan.chunk_heads * plan.chunk_tokens * p.num_slots * plan.heads_per_pair
        numbers |= {
            "counters": rows * plan.segments * counter_ints(plan.segments),
            "offsets": rows * (plan.segments + 1),
            "pairs of a group": plan.group_tokens * p.num_slots,
            "pairs of a block, as whole items": plan.chunk_tokens * p.num_slots + plan.tile.pairs_per_item,
            "partials": partials * p.value_dim,
        }
    if plan.query_tile is not None:
        numbers["parts of shared blocks"] = plan.query_tile.max_shared * (
            p.block_size // plan.query_tile.keys
        )
    assert {name: n for name, n in numbers.items() if n >= 2**31} == {}


@settings(max_examples=500)
@given(large_problems(), st.sampled_from(WORKSPACES), st.sampled_from(PATHS))
def test_backward(problem: Problem, limit_bytes: int, path: str) -> None:
    p = problem
    assume(takes(p, path))
    plan = plan_backward(p, limit_bytes, path)
    keys = plan.keys
    index_heads = keys.kv_heads if plan.index_per_head else 1
    rows = index_heads * -(-keys.group_tokens // keys.chunk_tokens)
    numbers = {
        "keys": rows * plan.segments,
        "offsets": rows * (plan.segments + 1),
        "pairs of a group": index_heads * keys.group_tokens * p.num_slots,
        "pairs of a block, as whole items": keys.chunk_tokens * p.num_slots + keys.pairs_per_item,
        "programs": keys.max_items * keys.launch_heads,
        "splits": keys.max_splits,
        "the last of q or out in a chunk": keys.chunk_tokens * p.num_q_heads * max(p.head_dim, p.value_dim)
        - 1,
        "pairs as they are packed": (keys.chunk_tokens << keys.slot_bits) - 1,
    }
    if keys.with_queries:
        shares = keys.launch_heads * keys.chunk_tokens * p.num_slots * p.heads_per_pair
        numbers["shares of grad_q"] = shares * p.head_dim
    assert {name: n for name, n in numbers.items() if n >= 2**31} == {}

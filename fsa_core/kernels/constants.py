"""The constants that kernels of an attended plan have in common."""

from fsa_core.plan import ForwardPlan
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim


def attention_constants(problem: Problem, plan: ForwardPlan) -> dict[str, int]:
    """Heads, dims and blocks, by the names of the kernels' parameters."""
    p = problem
    return {
        "NUM_Q_HEADS": p.num_q_heads, "NUM_KV_HEADS": p.num_kv_heads, "HEADS_PER_PAIR": plan.heads_per_pair,
        "TILE_HEADS_PER_KV_HEAD": plan.tile_heads_per_kv_head, "INDEX_PER_HEAD": plan.index_per_head,
        "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim, "HEAD_DIM_PADDED": padded_dim(p.head_dim),
        "VALUE_DIM_PADDED": padded_dim(p.value_dim), "BLOCK_SIZE": p.block_size, "CAUSAL": p.causal,
    }  # fmt: skip

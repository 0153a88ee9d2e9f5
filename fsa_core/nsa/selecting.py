"""Select and attend in one call that has nothing but q, k and v: no weights, no cache. What a server runs.

Keys (and, for the compressed branch, values) are compressed by their mean. As in ``fsa_core.api``, validation
and running are apart: what is validated in one process may run in another, packed with others.
"""

from dataclasses import dataclass, fields

import torch

from fsa_core.api import attend
from fsa_core.errors import refuse
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.stages import add_branches, attend_and_choose, attend_last_keys, choose_blocks
from fsa_core.nsa.validation import Call, check_gates
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from fsa_core.plan import workspace_bytes as attention_workspace_bytes
from fsa_core.problem import Problem
from fsa_core.validation import validate_dense

FLOAT32_BYTES = 4
# What the stages hold for each (head, query, window) and (KV head, query, block) of a chunk, at their worst.
SCORE_BYTES = 12
BLOCK_BYTES = 40
# Queries in a chunk, at most: under a window they widen the span of keys.
CHUNK_QUERIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectingProblem(Problem):
    """A call that chooses its blocks, seen as the selected attention that it comes to.

    ``index_heads`` is num_kv_heads, ``num_slots`` and ``block_size`` are ``config``'s. ``is_gated``: whether
    compressed and sliding-window attention are added, by gates [num_q_tokens, num_q_heads, 3] of q's dtype.
    """

    config: NSAConfig
    is_gated: bool

    @classmethod
    def of(cls, problem: Problem, config: NSAConfig, *, is_gated: bool) -> "SelectingProblem":
        """The call of ``problem``'s tensors, whatever its own blocks."""
        sizes = {field.name: getattr(problem, field.name) for field in fields(Problem)}
        sizes |= {"index_heads": problem.num_kv_heads, "num_slots": config.top_k}
        sizes |= {"block_size": config.block_size, "query_block_size": 1}
        return cls(**sizes, config=config, is_gated=is_gated)


@dataclass(frozen=True, slots=True)
class Selected:
    """out [num_q_tokens, num_q_heads, value_dim] in q's dtype; lse float32 [num_q_tokens, num_q_heads].

    A gated sum has no ``lse``. ``block_indices``: int32 [num_kv_heads, num_q_tokens, top_k], ascending, -1 in
    unused slots.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    block_indices: torch.Tensor


def validate_selecting(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> SelectingProblem:
    """The sizes of a call, or InputError; q, k, v and options as in ``validate_dense``.

    gates: [num_q_tokens, num_q_heads, 3] in q's dtype, for the compressed, the selected and the window
    branch; None: the selected branch alone.
    """
    dense = validate_dense(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=causal,
    )
    if not causal:
        refuse("INVALID_PATTERN", "causal", "value", False, "true, as selection looks back only")
    if gates is not None:
        if gates.dim() != 3:
            refuse("INVALID_RANK", "gates", "rank", gates.dim(), "3, [tokens, query heads, branches]")
        got, expected = (str(x.dtype).removeprefix("torch.") for x in (gates, q))
        if got != expected:
            refuse("INVALID_DTYPE", "gates", "dtype", got, f"{expected}, that of q")
        check_gates(gates, q)
    return SelectingProblem.of(dense, config, is_gated=gates is not None)


def select_and_attend(
    problem: SelectingProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Selected:
    """Run an already validated problem; bitwise the same whatever else is packed into the call.

    ``backend`` is the selected branch's, as in ``fsa_core.api``; the other stages run as kernels where these
    take their sizes, and else in torch operations. On CUDA it reads cu_seqlens, which synchronises.
    """
    call = Call(
        problem.config,
        cu_seqlens_q,
        cu_seqlens_k,
        tuple(cu_seqlens_k.tolist()),
        problem.softmax_scale,
        workspace_limit_bytes,
    )
    compress = MeanCompression(problem.config.kernel_size, problem.config.stride)
    k_cmp = compress(k, call.key_starts)
    if gates is None:
        block_indices = choose_blocks(call, q, k_cmp, "auto")
    else:
        v_cmp = compress(v, call.key_starts)
        (compressed, _), block_indices = attend_and_choose(call, q, k_cmp, v_cmp, "auto")
    out, lse = attend(
        problem,
        q,
        k,
        v,
        block_indices,
        cu_seqlens_q,
        cu_seqlens_k,
        backend=backend,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    if gates is None:
        return Selected(out, lse, block_indices)
    window, _ = attend_last_keys(call, q, k, v, "auto")
    return Selected(add_branches((compressed, out, window), gates, "auto"), None, block_indices)


def workspace_bytes(problem: SelectingProblem, limit_bytes: int = DEFAULT_WORKSPACE_BYTES) -> int:
    """Device memory beyond its inputs and outputs that the call takes at most; see docs/nsa.md.

    Near ``limit_bytes``, and compressed K and V and the branches beside it, unless the scores of a single
    query are too many for it.
    """
    p, config = problem, problem.config
    windows, blocks = p.num_k_tokens // config.stride, p.num_k_tokens // config.block_size + 1
    value_dim = p.value_dim if p.is_gated else 0
    compressed = windows * p.num_kv_heads * (p.head_dim + value_dim)
    span = min(p.num_k_tokens, config.window + CHUNK_QUERIES) if p.is_gated else 0
    widened = max(compressed, span * p.num_kv_heads * (p.head_dim + value_dim))
    rows = (
        p.num_kv_heads * (SCORE_BYTES * windows + BLOCK_BYTES * blocks),
        SCORE_BYTES * p.num_q_heads * (max(windows, span) if p.is_gated else 0),
    )
    # All queries at once, with float32 copies of them and of their answers, where the limit is more.
    copies = FLOAT32_BYTES * p.num_q_heads * (p.head_dim + p.value_dim)
    stages = min(max(limit_bytes, *rows), p.num_q_tokens * (sum(rows) + copies)) + FLOAT32_BYTES * widened
    # Three branches, their float32 sum and one float32 term of it; two numbers a row between the kernels.
    branches = p.num_q_tokens * p.num_q_heads * value_dim * (3 * p.dtype.itemsize + 2 * FLOAT32_BYTES)
    shares = p.num_q_tokens * p.num_q_heads * 2 * FLOAT32_BYTES
    attention = attention_workspace_bytes(p, limit_bytes)
    return compressed * p.dtype.itemsize + branches + shares + max(stages, attention)

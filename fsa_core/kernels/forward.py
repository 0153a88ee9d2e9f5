"""Selected attention, forward: KV blocks outside, the query tokens that chose them inside.

Flash Sparse Attention, arXiv 2508.18224, with one launch sequence for all sequences and heads. What
neighbouring tokens share is attended before, in query_tiles, if the plan's path says so.

Stages of the rest, a chunk of tokens at a time, no host synchronisation: index.invert, which lists for each
KV block the (token, slot) pairs that chose it, cut into work items; and partials, which attends and merges.
"""

import torch

from fsa_core.kernels import hopper
from fsa_core.kernels.agreement import agree, index_pairs, new_agreement
from fsa_core.kernels.chunk_buffers import chunk_buffers
from fsa_core.kernels.kept import kept_agreement
from fsa_core.kernels.launch import aside, rejoin
from fsa_core.kernels.partials import MOST_KEYS, attend_group, new_partials
from fsa_core.kernels.query_tiles import attend_shared
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.kernels.token_major import attend_tokens
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR, ForwardPlan, groups, plan_forward
from fsa_core.problem import Problem
from fsa_core.tiles import Tuning


def selected_attention_forward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    path: str = KV_MAJOR,
    tuning: Tuning | None = None,
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention over packed sequences; every tensor contiguous and on one device.

    q [total_q, num_q_heads, head_dim], k [total_k, num_kv_heads, head_dim], v [total_k, num_kv_heads,
    value_dim], block_indices int32 [index_heads, total_q, slots], cu_seqlens int32 [num_sequences + 1]. path:
    one of plan.PATHS; tuning: as in plan_forward, which says what raises ValueError.
    Returns out [total_q, num_q_heads, value_dim] in the dtype of q and lse float32 [total_q, num_q_heads].
    """
    tensors = (q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k)
    out, lse = forward_keeping(tensors, problem, path, tuning, workspace_limit_bytes, 0)
    return out, lse


def forward_keeping(
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    path: str,
    tuning: Tuning | None,
    workspace_limit_bytes: int,
    kept_bytes: int,
) -> tuple[torch.Tensor, ...]:
    """The answers of ``selected_attention_forward`` and what is kept for the gradients, if that has bytes.

    ``kept_bytes``: none, or as ``kept.kept_bytes`` says.
    """
    return _replayed(tensors, problem, path, tuning, workspace_limit_bytes, kept_bytes)


def plan_on(
    device: torch.device, problem: Problem, workspace_limit_bytes: int, path: str, tuning: Tuning | None
) -> ForwardPlan:
    """The plan of a call on a device."""
    buffers = chunk_buffers(problem, device, MOST_KEYS, hopper.MIN_FORWARD_BYTES)
    return plan_forward(problem, workspace_limit_bytes, path, tuning, buffers)


def _forward(
    memory: Memory,
    operands: tuple[torch.Tensor, ...],
    problem: Problem,
    path: str,
    tuning: Tuning | None,
    workspace_limit_bytes: int,
    kept_bytes: int,
) -> None:
    """Arguments and answers of ``forward_keeping``, tensors as ``operands``."""
    p, (q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k) = problem, operands
    out = memory.answer(p.num_q_tokens, p.num_q_heads, p.value_dim)
    lse = memory.answer(p.num_q_tokens, p.num_q_heads, dtype=torch.float32)
    if p.num_q_tokens == 0:
        return
    plan = plan_on(q.device, p, workspace_limit_bytes, path, tuning)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse)
    tile = plan.query_tile
    agreement = None
    if kept_bytes:
        agreement = kept_agreement(p, plan, memory.answer(kept_bytes, dtype=torch.uint8), is_new=True)
    elif tile is not None:
        agreement = new_agreement(p, plan, tile, memory)
    kept_left = None if agreement is None else agreement.kept_left
    workspace = new_partials(p, plan, memory, kept_left) if plan.has_partials else None
    inversion = None if workspace is None else workspace[0]
    starts = (cu_seqlens_q, cu_seqlens_k)
    for group in groups(p, plan):
        if tile is not None and agreement is not None:
            agree(agreement, p, plan, tile, group, block_indices, *starts, inversion)
        if inversion is not None:
            with aside():
                index_pairs(inversion, agreement, p, plan, group, block_indices, *starts)
        if tile is not None and agreement is not None:
            attend_shared(agreement, p, plan, tile, group, *tensors)
            if plan.has_leftover and workspace is None:
                attend_tokens(agreement, p, plan, group, *tensors)
        if workspace is not None:
            used = workspace[0].ranks if agreement is None else agreement.leftover
            rejoin()
            attend_group(p, plan, group, workspace, used, *tensors)


_replayed = Replayed(_forward)

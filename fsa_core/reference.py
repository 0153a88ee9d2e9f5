"""The oracle: attention in float64, one sequence at a time, written to be read rather than to be fast.

Every other implementation is tested against it, so it shares no algorithm with any of them: it builds
the mask of visible keys and takes a plain softmax. Memory is ``_ROWS_AT_ONCE`` rows of scores.
"""

import torch

from fsa_core.problem import Problem

_ROWS_AT_ONCE = 256


def selected_attention_reference(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token over the KV blocks it selected.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim], block_indices: int32 [index_heads, num_q_tokens, num_slots].
    Returns out float64 [num_q_tokens, num_q_heads, value_dim] and lse float64 [num_q_tokens, num_q_heads];
    a token without keys gives 0 and -inf.
    """
    return _attention(problem, q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k)


def dense_attention_reference(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token over every key it may see; shapes as in the selected form."""
    return _attention(problem, q, k, v, None, cu_seqlens_q, cu_seqlens_k)


def _attention(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = (problem.num_q_tokens, problem.num_q_heads)
    out = torch.zeros(*size, problem.value_dim, dtype=torch.float64, device=q.device)
    lse = torch.full(size, -torch.inf, dtype=torch.float64, device=q.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q_start, q_end, k_start, k_end in zip(
        starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True
    ):
        keys, values = k[k_start:k_end].double(), v[k_start:k_end].double()
        first_position = (k_end - k_start) - (q_end - q_start)
        for start in range(q_start, q_end, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, q_end))
            positions = first_position + torch.arange(rows.start, rows.stop, device=q.device) - q_start
            ids = None if block_indices is None else block_indices[:, rows]
            visible = _visible_keys(problem, positions, ids, k_end - k_start)
            out[rows], lse[rows] = _masked_softmax(problem, q[rows].double(), keys, values, visible)
    return out, lse


def _visible_keys(
    problem: Problem, positions: torch.Tensor, block_indices: torch.Tensor | None, num_keys: int
) -> torch.Tensor:
    """bool [num_q_heads, rows, num_keys]: which keys of its sequence each row attends to."""
    key = torch.arange(num_keys, device=positions.device)
    visible = torch.ones(problem.num_q_heads, len(positions), num_keys, dtype=torch.bool, device=key.device)
    if problem.causal:
        visible &= key <= positions[:, None]
    if block_indices is not None:
        chosen = torch.zeros(*block_indices.shape[:2], num_keys, dtype=torch.bool, device=key.device)
        for slot in range(problem.num_slots):
            chosen |= key // problem.block_size == block_indices[:, :, slot, None]
        visible &= chosen.repeat_interleave(problem.num_q_heads // problem.index_heads, dim=0)
    return visible


def _masked_softmax(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    k_per_q_head = k.repeat_interleave(problem.group_size, dim=1)
    v_per_q_head = v.repeat_interleave(problem.group_size, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k_per_q_head) * problem.softmax_scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    # A row without keys has lse = -inf, and -inf - -inf is not a number: its weights are zeros.
    weights = (scores - lse[..., None]).exp().masked_fill(~visible, 0.0)
    return torch.einsum("hts,shd->thd", weights, v_per_q_head), lse.T

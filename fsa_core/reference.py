"""The oracle: attention in float64, one sequence at a time, written to be read rather than to be fast.

Every other implementation is tested against it, so it shares no algorithm with any of them: it builds
the mask of visible keys and takes a plain softmax, and its gradients are torch's own derivatives of that
softmax, not a formula. Memory is a few times ``_ROWS_AT_ONCE`` rows of scores.
"""

from collections.abc import Iterator

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


def selected_attention_reference_backward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, float64 and in their shapes, from those of out and lse.

    ``out`` and ``lse`` were rounded to the dtypes of the answer, so they are not used but computed again. A
    token without keys has no gradient and gives none, whatever ``grad_out`` and ``grad_lse`` hold for it.
    """
    return _gradients(problem, q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, grad_out, grad_lse)


def dense_attention_reference_backward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of dense attention; as in the selected form."""
    return _gradients(problem, q, k, v, None, cu_seqlens_q, cu_seqlens_k, grad_out, grad_lse)


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
    for rows, keys, visible in _masks(problem, block_indices, cu_seqlens_q, cu_seqlens_k):
        answer = _masked_softmax(problem, q[rows].double(), k[keys].double(), v[keys].double(), visible)
        out[rows], lse[rows] = answer
    return out, lse


def _gradients(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    for rows, keys, visible in _masks(problem, block_indices, cu_seqlens_q, cu_seqlens_k):
        queries, its_keys, values = (
            x.detach().double().requires_grad_() for x in (q[rows], k[keys], v[keys])
        )
        with torch.enable_grad():
            answer = _masked_softmax(problem, queries, its_keys, values, visible)
        # A loss may have a pole at the -inf of a row without keys, and zero weights would not undo its NaN.
        sees_a_key = visible.any(-1).T
        grad_answer = (
            grad_out[rows].double().where(sees_a_key[..., None], 0.0),
            grad_lse[rows].double().where(sees_a_key, 0.0),
        )
        grads = torch.autograd.grad(answer, (queries, its_keys, values), grad_answer)
        grad_q[rows] = grads[0]
        grad_k[keys] += grads[1]
        grad_v[keys] += grads[2]
    return grad_q, grad_k, grad_v


def _masks(
    problem: Problem,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Some query tokens of one sequence, the sequence's keys, and which of them each token attends to."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q_start, q_end, k_start, k_end in zip(
        starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True
    ):
        first_position = (k_end - k_start) - (q_end - q_start)
        for start in range(q_start, q_end, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, q_end))
            token = torch.arange(rows.start, rows.stop, device=cu_seqlens_q.device)
            ids = None if block_indices is None else block_indices[:, rows]
            visible = _visible_keys(problem, first_position + token - q_start, ids, k_end - k_start)
            yield rows, slice(k_start, k_end), visible


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

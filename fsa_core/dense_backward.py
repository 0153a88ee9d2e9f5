"""Gradients of dense attention, plainly: float32 matrix products, some query rows of scores at a time.

Torch's FlashAttention operators take no gradient of the log-sum-exp. This does, on any device, and is slower.
"""

import torch

from fsa_core.dense import SCORES_BYTES, sequence_spans
from fsa_core.problem import Problem


def dense_attention_backward(
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
    """Gradients of q, k and v, in float32, from those of out and lse.

    Operands as in ``dense_attention_forward``; grad_out [num_q_tokens, num_q_heads, value_dim] in q's dtype,
    grad_lse float32 [num_q_tokens, num_q_heads]. A token without keys has no gradient and gives none. Reads
    the lengths of the sequences, which synchronises on CUDA.
    """
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    delta = (out * grad_out.float()).sum(-1) - grad_lse
    for rows, keys in sequence_spans(problem, cu_seqlens_q, cu_seqlens_k):
        num_keys = keys.stop - keys.start
        size = max(SCORES_BYTES // (4 * problem.num_q_heads * num_keys), 1)
        for start in range(rows.start, rows.stop, size):
            some = slice(start, min(start + size, rows.stop))
            position = torch.arange(some.start, some.stop, device=q.device) - rows.stop + num_keys
            grads = _of_rows(
                problem, position, q[some], grad_out[some], lse[some], delta[some], k[keys], v[keys]
            )
            grad_q[some] = grads[0]
            grad_k[keys] += grads[1]
            grad_v[keys] += grads[2]
    return grad_q, grad_k, grad_v


def _of_rows(
    problem: Problem,
    position: torch.Tensor,
    q: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The share of some queries of one sequence, each with its position among the sequence's keys."""
    group = problem.group_size
    q_hrd, grad_out_hrd, lse_hr, delta_hr = (_by_kv_head(x, group) for x in (q, grad_out, lse, delta))
    k_hsd, v_hsd = (_by_kv_head(x, 1) for x in (k, v))
    scores = q_hrd @ k_hsd.mT * problem.softmax_scale
    if problem.causal:
        key = torch.arange(len(k), device=k.device)
        scores.masked_fill_(key > position.repeat(group)[:, None], -torch.inf)
    weights = scores.sub_(lse_hr[..., None]).exp_()
    grad_v_hsd = weights.mT @ grad_out_hrd
    grad_scores = (
        (grad_out_hrd @ v_hsd.mT).sub_(delta_hr[..., None]).mul_(weights).mul_(problem.softmax_scale)
    )
    grad_q_hrd, grad_k_hsd = grad_scores @ k_hsd, grad_scores.mT @ q_hrd
    grad_q = grad_q_hrd.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    return grad_q, grad_k_hsd.transpose(0, 1), grad_v_hsd.transpose(0, 1)


def _by_kv_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[tokens, heads, ...] as float32 [kv_heads, group * tokens, ...]."""
    heads_apart: torch.Tensor = x.float().unflatten(1, (-1, group))
    return heads_apart.movedim(0, 2).flatten(1, 2)

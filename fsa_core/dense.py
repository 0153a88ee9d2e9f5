"""Dense attention over packed sequences, through what torch has: the honest baseline of the sparse kernels.

Bitwise batch-invariant by construction: FlashAttention gives each tile of queries to one thread block that
walks that sequence's keys in order (never split), and elsewhere each sequence is a call of its own on freshly
laid out copies.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fsa_core.packing import fresh, place_queries
from fsa_core.problem import Problem

# Bytes of scores that the CUDA float32 path, and the gradients, hold at once.
SCORES_BYTES = 64 * 2**20
# The FlashAttention kernels take head dims that are multiples of this.
FLASH_DIM_MULTIPLE = 8


def dense_attention_forward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token over every key it may see.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim]. Returns out [num_q_tokens, num_q_heads, value_dim] in q's
    dtype, lse float32 [num_q_tokens, num_q_heads]; a token without keys gives 0 and -inf. On CUDA the lengths
    of several sequences are read, which synchronises.
    """
    if q.is_cuda and problem.num_k_tokens and problem.dtype != torch.float32:
        return _flash_cuda(problem, q, k, v, cu_seqlens_q, cu_seqlens_k)
    out = q.new_zeros(problem.num_q_tokens, problem.num_q_heads, problem.value_dim)
    lse = torch.full(out.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    attend = _rows_of_scores if q.is_cuda else _flash_cpu
    for rows, keys in sequence_spans(problem, cu_seqlens_q, cu_seqlens_k):
        out[rows], lse[rows] = attend(problem, q[rows], k[keys], v[keys])
    return out, lse


def sequence_spans(
    problem: Problem, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> Iterator[tuple[slice, slice]]:
    """The queries of each sequence that see a key, and its keys."""
    spans_q, spans_k = (itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    for (q_start, q_end), (k_start, k_end) in zip(spans_q, spans_k, strict=True):
        if problem.causal:
            # The queries that come before the first key see nothing.
            q_start = max(q_start, q_end - (k_end - k_start))
        if q_end > q_start and k_end > k_start:
            yield slice(q_start, q_end), slice(k_start, k_end)


def _flash_cuda(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-max(problem.head_dim, problem.value_dim) // FLASH_DIM_MULTIPLE) * FLASH_DIM_MULTIPLE
    # Told of one query a sequence, it would split the keys, and how depends on the size of the batch.
    max_q = max(_longest(cu_seqlens_q, problem.num_q_tokens), 2)
    max_k = _longest(cu_seqlens_k, problem.num_k_tokens)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(_widened(x, width) for x in (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,
        problem.causal,
        False,
        scale=problem.softmax_scale,
    )
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, problem.num_q_tokens, causal=problem.causal)
    sees_nothing = placed.num_visible_keys[:, None] == 0
    out = out[..., : problem.value_dim].masked_fill(sees_nothing[..., None], 0)
    return out, lse.T.masked_fill(sees_nothing, -torch.inf).contiguous()


def _longest(cu_seqlens: torch.Tensor, num_tokens: int) -> int:
    return num_tokens if cu_seqlens.numel() == 2 else int(cu_seqlens.diff().amax())


def _flash_cpu(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence through torch's FlashAttention for the CPU, in float32; under causal len_q <= len_k."""
    width = max(problem.head_dim, problem.value_dim)
    num_q, num_k, group = len(q), len(k), problem.group_size
    # Batch and heads of the operator are KV heads and their group, so that K and V need no copy a query head.
    q_hgtd = fresh(_widened(q, width).unflatten(1, (-1, group)).permute(1, 2, 0, 3))
    k_hgtd, v_hgtd = (
        fresh(_widened(x, width).transpose(0, 1))[:, None].expand(-1, group, -1, -1) for x in (k, v)
    )

    def attend(keys: slice, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_hgtd, k_hgtd[:, :, keys], v_hgtd[:, :, keys], 0.0, is_causal, scale=problem.softmax_scale
        )
        return out, lse

    if not problem.causal or num_q == 1:
        out, lse = attend(slice(0, num_k), False)
    else:
        # The operator aligns its mask to the first key; here the last query sees the last key. So the square
        # at the end is causal, and what comes before it is seen whole.
        before = num_k - num_q
        out, lse = attend(slice(before, num_k), True)
        if before:
            out, lse = _merged(out, lse, *attend(slice(0, before), False))
    return out.permute(2, 0, 1, 3).flatten(1, 2)[..., : problem.value_dim], lse.permute(2, 0, 1).flatten(1, 2)


def _merged(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from the attention over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None], lse


def _rows_of_scores(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, plainly, some rows of scores at a time; under causal len_q <= len_k."""
    num_q, num_k, group = len(q), len(k), problem.group_size
    out, lse = (
        q.new_empty(num_q, problem.num_q_heads, problem.value_dim),
        q.new_empty(num_q, problem.num_q_heads),
    )
    k_hds, v_hsd = k.permute(1, 2, 0), v.transpose(0, 1)
    size = max(SCORES_BYTES // (4 * problem.num_q_heads * num_k), 1)
    for start in range(0, num_q, size):
        rows = slice(start, min(start + size, num_q))
        q_hrd = q[rows].unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = (q_hrd @ k_hds * problem.softmax_scale).unflatten(1, (group, -1))
        if problem.causal:
            position = torch.arange(rows.start, rows.stop, device=q.device) + num_k - num_q
            scores.masked_fill_(torch.arange(num_k, device=q.device) > position[:, None], -torch.inf)
        lse[rows] = scores.logsumexp(-1).permute(2, 0, 1).flatten(1, 2)
        weighted = (scores.softmax(-1).flatten(1, 2) @ v_hsd).unflatten(1, (group, -1))
        out[rows] = weighted.permute(2, 0, 1, 3).flatten(1, 2)
    return out, lse


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))

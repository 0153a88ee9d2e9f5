"""The oracle of the operator: float64, one sequence at a time, masks and loops, written to be read.

Every function keeps to autograd, so its gradients are the oracle's as well. Weights are powers of two,
2^(x / ln 2) for e^x: with softmax_scale = ln 2 and whole numbers in q and k every weight is exact, and ties
between blocks are ties and not roundings.

Source: Native Sparse Attention, arXiv 2502.11089; the numbers of equations are the paper's.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fsa_core.nsa.config import NSAConfig

Answer = tuple[torch.Tensor, torch.Tensor]
Pool = Callable[[torch.Tensor], torch.Tensor]


def compress_reference(
    x: torch.Tensor, cu_seqlens: torch.Tensor, config: NSAConfig, pool: Pool
) -> torch.Tensor:
    """Equation 7: ``pool`` of every whole window of every sequence, float64 [num_windows, heads, dim].

    x: [num_tokens, heads, head_dim]; ``pool`` maps a window [kernel_size, heads, head_dim] to [heads, dim].
    """
    pooled = [
        pool(x[start + first : start + first + config.kernel_size].double())
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        for first in range(0, end - start - config.kernel_size + 1, config.stride)
    ]
    return torch.stack(pooled) if pooled else x[:0].double()


def pool_mean(window: torch.Tensor) -> torch.Tensor:
    """The mean of the window's tokens."""
    return window.mean(0)


def pool_weighted(window: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of the window's tokens, each times its weight; weight: [heads, kernel_size]."""
    return torch.einsum("khd,hk->hd", window, weight)


def pool_linear(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear map of the whole window; weight: [heads, kernel_size, head_dim, dim], bias: [heads, dim]."""
    return torch.einsum("khd,hkde->he", window, weight) + bias


def pool_mlp(
    window: torch.Tensor,
    position: torch.Tensor,
    weight_in: torch.Tensor,
    bias_in: torch.Tensor,
    weight_out: torch.Tensor,
    bias_out: torch.Tensor,
) -> torch.Tensor:
    """An MLP of the whole window with intra-block position, GELU between its two layers.

    position: [heads, kernel_size, head_dim], weight_in: [heads, kernel_size, head_dim, hidden],
    bias_in: [heads, hidden], weight_out: [heads, hidden, dim], bias_out: [heads, dim].
    """
    hidden = pool_linear(window + position.transpose(0, 1), weight_in, bias_in)
    return torch.einsum("hf,hfe->he", F.gelu(hidden), weight_out) + bias_out


def compressed_attention_reference(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> Answer:
    """Attention of each query over the windows whose last key it may see.

    q: [num_q_tokens, num_q_heads, head_dim], k_cmp: [num_windows, num_kv_heads, head_dim],
    v_cmp: [num_windows, num_kv_heads, value_dim]; cu_seqlens_k are the keys' before compression. Returns out
    float64 [num_q_tokens, num_q_heads, value_dim], lse float64 [num_q_tokens, num_q_heads]; 0 and -inf where
    no window is visible.
    """
    answers = []
    for queries, windows, position in _sequences_of_windows(cu_seqlens_q, cu_seqlens_k, config):
        visible = _visible_windows(position, windows.stop - windows.start, config)
        answers.append(
            _masked_attention(q[queries], k_cmp[windows], v_cmp[windows], visible[None], softmax_scale)
        )
    return _packed(answers)


def block_importance_reference(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> list[torch.Tensor]:
    """Equations 8 to 10: for each sequence float64 [num_kv_heads, its queries, its blocks].

    Counting from 0, with r = block_size / stride and n = kernel_size / stride, a head gives block j

        p_slc[j] = sum over m in [0, r), over i in [0, n) of p_cmp[r * j + m - i],

    which is each window's probability times the number of strides that it shares with the block. Windows that
    do not exist, or that the query may not see, count as 0. The heads of a group are summed.
    """
    result = []
    spans = itertools.pairwise(cu_seqlens_k.tolist())
    sequences = _sequences_of_windows(cu_seqlens_q, cu_seqlens_k, config)
    for (k_start, k_end), (queries, windows, position) in zip(spans, sequences, strict=True):
        num_blocks = -(-(k_end - k_start) // config.block_size)
        shared = _shared_strides(windows.stop - windows.start, num_blocks, config).to(q.device)
        visible = _visible_windows(position, windows.stop - windows.start, config)
        weights = _weights(q[queries], k_cmp[windows], visible[None], softmax_scale)[0]
        total = weights.sum(-1, keepdim=True)
        # The weights of a block are added before the division: sums of powers of two are exact.
        per_head = (weights @ shared) / total.where(total > 0, 1.0)
        result.append(per_head.unflatten(0, (k_cmp.shape[1], -1)).sum(1))
    return result


def select_blocks_reference(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> torch.Tensor:
    """Equation 11: int32 [num_kv_heads, num_q_tokens, top_k], ids ascending, then -1.

    A query's candidates are the blocks up to its own. Forced blocks come first, then the others by
    importance, the lower id before the higher where they are equal; ``config`` says when to stop.
    """
    importance = block_importance_reference(q, k_cmp, cu_seqlens_q, cu_seqlens_k, config, softmax_scale)
    sequences = _sequences_of_windows(cu_seqlens_q, cu_seqlens_k, config)
    size = (k_cmp.shape[1], q.shape[0], config.top_k)
    chosen = torch.full(size, -1, dtype=torch.int32, device="cpu")
    for rows, (queries, _, position) in zip(importance, sequences, strict=True):
        for head, row in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
            ids = _choose(rows[head, row].tolist(), int(position[row]), config)
            row_ids = torch.tensor(ids, dtype=torch.int32, device="cpu")
            chosen[head, queries.start + row, : len(ids)] = row_ids
    return chosen.to(q.device)


def selected_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> Answer:
    """Attention of each query over the blocks it selected, int32 [num_kv_heads, num_q_tokens, slots]."""
    answers = []
    for queries, keys, position in _sequences(cu_seqlens_q, cu_seqlens_k):
        key = torch.arange(keys.stop - keys.start, device=q.device)
        chosen = (key // config.block_size == block_indices[:, queries, :, None]).any(2)
        visible = chosen & (key <= position[:, None])
        answers.append(_masked_attention(q[queries], k[keys], v[keys], visible, softmax_scale))
    return _packed(answers)


def sliding_window_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> Answer:
    """Attention of each query over the last ``window`` keys up to its own."""
    answers = []
    for queries, keys, position in _sequences(cu_seqlens_q, cu_seqlens_k):
        distance = position[:, None] - torch.arange(keys.stop - keys.start, device=q.device)
        visible = (distance >= 0) & (distance < config.window)
        answers.append(_masked_attention(q[queries], k[keys], v[keys], visible[None], softmax_scale))
    return _packed(answers)


def nsa_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> torch.Tensor:
    """Equation 5: the three branches times their gates, float64 [num_q_tokens, num_q_heads, value_dim].

    gates: [num_q_tokens, num_q_heads, 3], for the compressed, the selected and the window branch.
    """
    rest = (cu_seqlens_q, cu_seqlens_k, config, softmax_scale)
    block_indices = select_blocks_reference(q.detach(), k_cmp.detach(), *rest)
    branches = (
        compressed_attention_reference(q, k_cmp, v_cmp, *rest)[0],
        selected_attention_reference(q, k, v, block_indices, *rest)[0],
        sliding_window_attention_reference(q, k, v, *rest)[0],
    )
    return sum(
        (gates[..., i, None].double() * out for i, out in enumerate(branches)), torch.zeros_like(branches[0])
    )


def _sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Each sequence's queries, its keys, and the positions of the queries among the keys."""
    spans = (itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    for (q_start, q_end), (k_start, k_end) in zip(*spans, strict=True):
        position = torch.arange(q_end - q_start, device=cu_seqlens_q.device)
        yield slice(q_start, q_end), slice(k_start, k_end), position + (k_end - k_start) - (q_end - q_start)


def _sequences_of_windows(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, config: NSAConfig
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """As ``_sequences``, with the windows that lie whole in the keys instead of the keys."""
    first = 0
    for queries, keys, position in _sequences(cu_seqlens_q, cu_seqlens_k):
        num_windows = len(range(0, keys.stop - keys.start - config.kernel_size + 1, config.stride))
        yield queries, slice(first, first + num_windows), position
        first += num_windows


def _visible_windows(position: torch.Tensor, num_windows: int, config: NSAConfig) -> torch.Tensor:
    """bool [queries, num_windows]: the window's last key is not after the query."""
    last_key = torch.arange(num_windows, device=position.device) * config.stride + config.kernel_size - 1
    return last_key <= position[:, None]


def _shared_strides(num_windows: int, num_blocks: int, config: NSAConfig) -> torch.Tensor:
    """float64 [num_windows, num_blocks]: how many strides a window shares with a block (equation 9)."""
    shared = torch.zeros(num_windows, num_blocks, dtype=torch.float64, device="cpu")
    per_block, per_window = config.block_size // config.stride, config.kernel_size // config.stride
    for block in range(num_blocks):
        for m, i in itertools.product(range(per_block), range(per_window)):
            window = per_block * block + m - i
            if 0 <= window < num_windows:
                shared[window, block] += 1
    return shared


def _choose(importance: list[float], position: int, config: NSAConfig) -> list[int]:
    """The ids, ascending, that one row selects."""
    own = position // config.block_size
    candidates = range(own + 1)
    total = sum(importance)

    def is_forced(block: int) -> bool:
        return block < config.num_first_blocks or block > own - config.num_local_blocks

    ranked = sorted(candidates, key=lambda block: (not is_forced(block), -importance[block], block))
    chosen: list[int] = []
    held = 0.0
    for block in ranked[: config.top_k]:
        if not is_forced(block):
            if config.ending_share is not None and held >= config.ending_share * total:
                break
            if config.min_share is not None and importance[block] < config.min_share * total:
                break
        chosen.append(block)
        held += importance[block]
    return sorted(chosen)


def _weights(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised softmax weights [num_q_heads, queries, keys], and the base-2 maximum they are relative to.

    q: [queries, num_q_heads, head_dim], k: [keys, num_kv_heads, head_dim], visible: bool
    [1 | num_kv_heads, queries, keys]. A row without keys has weights of 0 and a maximum of 0.
    """
    group = q.shape[1] // k.shape[1]
    k_per_q_head = k.double().repeat_interleave(group, dim=1)
    visible = visible.expand(k.shape[1], -1, -1).repeat_interleave(group, dim=0)
    scores = torch.einsum("thd,shd->hts", q.double(), k_per_q_head) * (softmax_scale / math.log(2))
    scores = scores.masked_fill(~visible, -torch.inf)
    if not scores.shape[-1]:
        return scores, scores.new_zeros(*scores.shape[:2], 1)
    row_max = scores.detach().amax(-1, keepdim=True)
    row_max = row_max.where(row_max > -torch.inf, 0.0)
    return torch.exp2(scores - row_max), row_max


def _masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> Answer:
    """Softmax over the visible keys: out [queries, num_q_heads, value_dim], lse [queries, num_q_heads]."""
    weights, row_max = _weights(q, k, visible, softmax_scale)
    total = weights.sum(-1, keepdim=True)
    # A row without keys divides by 1 and has no logarithm: its gradients are zeros, not NaN.
    is_empty = total == 0
    divisor = total.where(~is_empty, 1.0)
    v_per_q_head = v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    out = torch.einsum("hts,shd->thd", weights / divisor, v_per_q_head)
    lse = ((row_max + divisor.log2()) * math.log(2)).masked_fill(is_empty, -torch.inf)
    return out, lse[..., 0].T


def _packed(answers: list[Answer]) -> Answer:
    outs, lses = zip(*answers, strict=True)
    return torch.cat(outs), torch.cat(lses)

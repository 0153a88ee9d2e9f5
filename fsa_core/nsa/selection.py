"""Compressed attention, and the blocks that it finds important, in torch operations and bounded memory.

Importance is computed in base 2, and the weights of a block are added before they are divided by their row's
sum. With softmax_scale = ln 2 and whole numbers in q and k weights are powers of two and their sums exact, so
that equal blocks tie exactly, here as in the oracle. Otherwise rounding decides between near equals, and may
do so differently in calls of other lengths.

Source: Native Sparse Attention, arXiv 2502.11089, equations 8 to 11.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.intervals import Intervals, interval_attention
from fsa_core.nsa.validation import Call
from fsa_core.packing import fresh

# More rows amortise nothing more.
MAX_ROWS = 1024
# Bytes that each (KV head, query, window) takes at its worst: scores, their padded copy, and for each of its
# blocks a few numbers and an int64 id.
WINDOW_BYTES = 12
BLOCK_BYTES = 40
# And what each slot takes while budgets are looked at: ids, ranks, their orders.
SLOT_BYTES = 96
# Above every id.
NO_BLOCK = 2**31 - 1


def compressed_attention_torch(
    call: Call, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the windows whose last key a query may see: out, lse as ``interval_attention``."""
    return interval_attention(
        q,
        k_cmp,
        v_cmp,
        compressed_intervals(call, q),
        softmax_scale=call.softmax_scale,
        workspace_limit_bytes=call.workspace_limit_bytes,
    )


def compressed_intervals(call: Call, q: torch.Tensor) -> Intervals:
    """Which windows each query sees."""
    visible = call.visible_windows(call.place(q.shape[0]))
    starts = (call.cu_seqlens_q.tolist(), list(call.window_starts))
    return Intervals(torch.zeros_like(visible), visible, *starts)


@torch.no_grad()
def select_blocks_torch(call: Call, q: torch.Tensor, k_cmp: torch.Tensor) -> torch.Tensor:
    """The blocks that each query selects: int32 [num_kv_heads, num_q_tokens, top_k], ascending, then -1.

    Beside the answer and a few numbers a query it takes ``workspace_limit_bytes``, or what one query needs if
    that is more. NaN in a row of scores makes its blocks equal, so that forced and lowest ids are chosen.
    """
    num_kv_heads = k_cmp.shape[1]
    chosen = torch.full((num_kv_heads, len(q), call.config.top_k), -1, dtype=torch.int32, device=q.device)
    placed = call.place(len(q))
    visible_windows = call.visible_windows(placed)
    starts_cmp = call.window_starts
    for sequence, rows in _chunks(call, num_kv_heads):
        position, windows_seen = placed.position[rows], visible_windows[rows]
        first = starts_cmp[sequence]
        windows = slice(first, first + int(windows_seen[-1]))
        num_blocks = int(position[-1]) // call.config.block_size + 1
        if num_blocks > 0:
            importance = _importance(call, q[rows], k_cmp[windows], windows_seen, num_blocks)
            chosen[:, rows] = _choose(importance, position, call.config)
    return chosen


def spend_budget(
    call: Call, ids: torch.Tensor, importance: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """``ids`` [num_kv_heads, num_q_tokens, top_k], ascending, then -1, without those past the budgets.

    importance: float32 of each, 0 of none; total: float32 [num_kv_heads, num_q_tokens], of the whole row.
    """
    own = call.place(ids.shape[1]).position.div(call.config.block_size, rounding_mode="floor")[:, None]
    rows = max(call.workspace_limit_bytes // (ids[:, :1].numel() * SLOT_BYTES), 1)
    chunks = zip(*(x.split(rows, dim=1) for x in (ids, importance, total)), own.split(rows), strict=True)
    within = []
    for some, held, row_total, own_block in chunks:
        blocks = some.long().masked_fill(some < 0, NO_BLOCK)
        forced = _is_forced(blocks, own_block, call.config)
        kept = _within_budget(blocks, held, forced, row_total[..., None], call.config)
        within.append(kept.masked_fill(kept == NO_BLOCK, -1).int())
    return torch.cat(within, dim=1)


def _chunks(call: Call, num_kv_heads: int) -> Iterator[tuple[int, slice]]:
    """(sequence, queries) that fit the workspace together."""
    config = call.config
    spans = map(itertools.pairwise, (call.cu_seqlens_q.tolist(), call.key_starts))
    for sequence, ((q_start, q_end), (k_start, k_end)) in enumerate(zip(*spans, strict=True)):
        num_keys = k_end - k_start
        row_bytes = num_keys // config.stride * WINDOW_BYTES + num_keys // config.block_size * BLOCK_BYTES
        at_once = call.workspace_limit_bytes // max(num_kv_heads * row_bytes, 1)
        at_once = min(max(at_once, 1), MAX_ROWS)
        for start in range(q_start, q_end, at_once):
            yield sequence, slice(start, min(start + at_once, q_end))


def _importance(
    call: Call, q: torch.Tensor, k_cmp: torch.Tensor, windows_seen: torch.Tensor, num_blocks: int
) -> torch.Tensor:
    """float32 [num_kv_heads, rows, num_blocks], summed over the heads of each group, head after head.

    q: [rows, num_q_heads, head_dim], k_cmp: [windows, num_kv_heads, head_dim], windows_seen: [rows].
    """
    num_windows, num_kv_heads, _ = k_cmp.shape
    importance = torch.zeros(num_kv_heads, len(q), num_blocks, dtype=torch.float32, device=q.device)
    if not num_windows:
        return importance
    is_hidden = torch.arange(num_windows, device=q.device) >= windows_seen[:, None]
    q_grouped = fresh(q.unflatten(1, (num_kv_heads, -1)).permute(2, 1, 0, 3))
    k_by_head = fresh(k_cmp.transpose(0, 1)).transpose(1, 2)
    for q_head in q_grouped:
        scores = torch.bmm(q_head, k_by_head).mul_(call.softmax_scale / math.log(2))
        scores.masked_fill_(is_hidden, -torch.inf)
        row_max = scores.amax(-1, keepdim=True)
        row_max.masked_fill_(row_max == -torch.inf, 0.0)
        weights = scores.sub_(row_max).exp2_()
        total = weights.sum(-1, keepdim=True)
        importance += _sums_over_blocks(weights, num_blocks, call.config) / total.where(total != 0, 1.0)
    return importance.nan_to_num_(nan=0.0)


def _sums_over_blocks(weights: torch.Tensor, num_blocks: int, config: NSAConfig) -> torch.Tensor:
    """Equation 9: each window's weight, times the strides that it shares with a block.

    Element by element and in the same order for every block, so that equal blocks have equal sums.
    """
    per_block, per_window = config.block_size // config.stride, config.kernel_size // config.stride
    # Window r * j + m - i, for m in [0, r) and i in [0, n), lies at r * j + m - i + n - 1 when padded so.
    before = per_window - 1
    after = max(per_block * num_blocks - weights.shape[-1], 0)
    padded = F.pad(weights, (before, after))
    shared = Counter(m - i + before for m in range(per_block) for i in range(per_window))
    sums = torch.zeros(*weights.shape[:-1], num_blocks, dtype=torch.float32, device=weights.device)
    for offset in sorted(shared):
        every_block = padded[..., offset : offset + per_block * (num_blocks - 1) + 1 : per_block]
        sums.add_(every_block, alpha=shared[offset])
    return sums


def _choose(importance: torch.Tensor, position: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """int32 [num_kv_heads, rows, top_k] from importance [num_kv_heads, rows, num_blocks]."""
    own = (position.div(config.block_size, rounding_mode="floor"))[:, None]
    block = torch.arange(importance.shape[-1], device=importance.device)
    is_candidate = block <= own
    rank = importance.masked_fill(is_candidate & _is_forced(block, own, config), torch.inf)
    ids = _largest(rank.masked_fill_(~is_candidate, -torch.inf), config.top_k)
    if config.has_budget:
        held = F.pad(importance, (0, 1)).gather(-1, ids.clamp(max=len(block)))
        total = importance.sum(-1, keepdim=True)
        ids = _within_budget(ids, held, _is_forced(ids, own, config), total, config)
    ids = ids.masked_fill(ids == NO_BLOCK, -1).int()
    return F.pad(ids, (0, config.top_k - ids.shape[-1]), value=-1)


def _is_forced(block: torch.Tensor, own: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """Whether a query in block ``own`` has to select ``block``, if that is a candidate."""
    return (block < config.num_first_blocks) | ((block > own - config.num_local_blocks) & (block <= own))


def _largest(rank: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [..., min(count, n)]: ids of the largest of ``rank`` [..., n], ascending, the lower of equals.

    -inf is no candidate; NO_BLOCK stands where there are fewer. ``torch.topk`` promises nothing about equals,
    but the least of the values that it gives says how many of them are to be taken.
    """
    n = rank.shape[-1]
    count = min(count, n)
    least = rank.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    is_above, is_equal = rank > least, rank == least
    num_missing = count - is_above.sum(-1, keepdim=True)
    is_taken = is_above | (is_equal & (is_equal.cumsum(-1, dtype=torch.int32) <= num_missing))
    is_taken &= rank > -torch.inf
    ids = torch.arange(n, device=rank.device).where(is_taken, NO_BLOCK)
    return ids.topk(count, dim=-1, largest=False, sorted=True).values


def _within_budget(
    ids: torch.Tensor, held: torch.Tensor, forced: torch.Tensor, total: torch.Tensor, config: NSAConfig
) -> torch.Tensor:
    """``ids`` [..., n] without those past ``top_p`` or under ``min_share``; ascending, then NO_BLOCK.

    held: importance of each, 0 of none; total [..., 1]: of the whole row, which shares are of.
    """
    rank = held.masked_fill(forced, torch.inf).masked_fill_(ids == NO_BLOCK, -torch.inf)
    ranked, order = rank.sort(dim=-1, descending=True, stable=True)
    ids, held = ids.gather(-1, order), held.gather(-1, order)
    keep = torch.ones_like(ids, dtype=torch.bool)
    if config.ending_share is not None:
        held_before = F.pad(held.cumsum(-1)[..., :-1], (1, 0))
        keep &= held_before < config.ending_share * total
    if config.min_share is not None:
        keep &= held >= config.min_share * total
    keep |= ranked == torch.inf
    return ids.where(keep, NO_BLOCK).sort(dim=-1).values

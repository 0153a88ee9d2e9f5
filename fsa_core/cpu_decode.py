"""Selected attention over a paged cache on the CPU: chosen blocks are gathered and attended in float32."""

import torch

from fsa_core.cpu_parts import CPU_WORKSPACE_BYTES
from fsa_core.packing import place_queries, starts_of
from fsa_core.problem import Problem


def paged_selected_attention_cpu(
    problem: Problem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step over the blocks they chose; shapes as in ``fsa_core.decode``.

    cu_seqlens_q: [num_sequences + 1], of any integers. Returns out in q's dtype and lse float32. What is
    gathered at once stays near CPU_WORKSPACE_BYTES; a single token may need more. Ids that a token may not
    see, and pages that do not exist, are ignored.
    """
    p = problem
    out = q.new_empty(p.num_q_tokens, p.num_q_heads, p.value_dim)
    lse = q.new_empty(p.num_q_tokens, p.num_q_heads, dtype=torch.float32)
    placed = place_queries(cu_seqlens_q, starts_of(seq_lens), p.num_q_tokens, causal=True)
    num_units = max(p.index_heads, p.num_kv_heads)
    token_bytes = 4 * num_units * p.num_slots * p.block_size * (p.head_dim + p.value_dim)
    token = torch.arange(p.num_q_tokens, device=q.device)
    for some in token.split(max(CPU_WORKSPACE_BYTES // token_bytes, 1)):
        table = page_table[placed.sequence[some]]
        chosen = (block_indices[:, some], table, placed.num_visible_keys[some])
        out[some], lse[some] = _attend(p, q[some], k_cache, v_cache, *chosen)
    return out, lse


def _attend(
    problem: Problem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_indices: torch.Tensor,
    page_table: torch.Tensor,
    num_visible_keys: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens, each with a row of page_table [num_tokens, max_pages] and of num_visible_keys."""
    p, num_tokens = problem, len(q)
    num_units = max(p.index_heads, p.num_kv_heads)
    # All of the following is [units, num_tokens, slots, ...]: a unit has a row of ids and a KV head.
    ids = block_indices.expand(num_units, -1, -1).long()
    column = ids * p.block_size // k_cache.shape[1]
    known = (ids >= 0) & (column < page_table.shape[1])
    page = page_table.expand(num_units, -1, -1).gather(2, column.where(known, 0))
    known &= (page >= 0) & (page < k_cache.shape[0])
    key = ids[..., None] * p.block_size + torch.arange(p.block_size, device=q.device)
    visible = (known[..., None] & (key < num_visible_keys[:, None, None])).flatten(2)
    place = (page.where(known, 0)[..., None], key % k_cache.shape[1])
    unit = torch.arange(num_units, device=q.device).view(-1, 1, 1, 1)
    kv_head = unit // (num_units // p.num_kv_heads)
    k, v = (cache[*place, kv_head].float().flatten(2, 3) for cache in (k_cache, v_cache))
    # Zero times what nobody sees has to be zero, also if that is a NaN.
    v.masked_fill_(~visible[..., None], 0.0)
    of_units = q.view(num_tokens, num_units, p.heads_per_pair, p.head_dim).transpose(0, 1).float()
    scores = (of_units @ k.mT).mul_(p.softmax_scale).masked_fill_(~visible[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # A token without keys has weights of 0.
    weights = scores.sub_(lse.where(lse != -torch.inf, 0.0)[..., None]).exp_()
    out = (weights @ v).transpose(0, 1).reshape(num_tokens, p.num_q_heads, p.value_dim)
    return out.to(q.dtype), lse.transpose(0, 1).reshape(num_tokens, p.num_q_heads)

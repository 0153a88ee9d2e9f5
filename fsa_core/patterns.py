"""Sparsity patterns, and the one normal form that everything after them knows: a row a query token."""

from dataclasses import dataclass

import torch

from fsa_core.packing import place_queries, row_starts


@dataclass(frozen=True, slots=True)
class BlockIndices:
    """Selected KV blocks: int32 ``indices`` [1 | num_kv_heads | num_q_heads, rows, num_slots].

    Each row lists block ids inside its own sequence, -1 in unused slots, for ``query_block_size`` queries
    counted from the first query of each sequence. ``block_size`` is in keys.
    """

    indices: torch.Tensor
    block_size: int
    query_block_size: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """Full attention."""


Pattern = BlockIndices | Dense


def expand_query_blocks(
    block_indices: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    num_q_tokens: int | None = None,
) -> torch.Tensor:
    """The normal form of validated indices: int32 [heads, num_q_tokens, num_slots], one row a token.

    Under ``causal`` a row may name blocks that only its later queries reach; for the earlier ones they
    become -1. ``num_q_tokens`` saves reading it from ``cu_seqlens_q`` (a synchronisation on CUDA).
    """
    if query_block_size == 1:
        return block_indices
    num_q_tokens = int(cu_seqlens_q[-1]) if num_q_tokens is None else num_q_tokens
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, num_q_tokens, causal=causal)
    starts = row_starts(cu_seqlens_q, query_block_size)[placed.sequence]
    token = torch.arange(num_q_tokens, device=block_indices.device)
    row = starts + (token - cu_seqlens_q[placed.sequence]) // query_block_size
    ids = block_indices[:, row.clamp_(0, max(block_indices.shape[1] - 1, 0))]
    if causal:
        num_visible_blocks = -(-placed.num_visible_keys // block_size)
        ids.masked_fill_(ids >= num_visible_blocks[:, None], -1)
    return ids

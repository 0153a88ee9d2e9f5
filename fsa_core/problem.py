"""The sizes of one attention call: what planning, batching and dispatch decide from."""

from dataclasses import dataclass

import torch

BLOCK_SIZES = (16, 32, 64, 128, 256)
MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 256
# A slot has 12 bits where the kernels pack it with a token into one integer.
MAX_SLOTS = 4096


@dataclass(frozen=True, slots=True)
class Problem:
    """One validated attention call over packed ("varlen") sequences.

    ``block_size`` is 0 for dense attention, and so are ``index_heads`` and ``num_slots``.
    ``index_heads`` is 1, ``num_kv_heads`` or ``num_q_heads``; ``num_slots`` is the K of
    ``block_indices [index_heads, num_q_tokens, num_slots]``, one row a query token. So many consecutive rows
    of a sequence, from its first, are one row that they share: ``query_block_size``.
    """

    num_q_tokens: int
    num_k_tokens: int
    num_sequences: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    index_heads: int
    num_slots: int
    block_size: int
    causal: bool
    softmax_scale: float
    query_block_size: int = 1

    @property
    def is_dense(self) -> bool:
        return self.block_size == 0

    @property
    def group_size(self) -> int:
        """Query heads a KV head serves (the GQA group)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def heads_per_pair(self) -> int:
        """Query heads that share a row of block indices and a KV head; not of dense attention."""
        return self.num_q_heads // max(self.index_heads, self.num_kv_heads)

"""A row of block indices a query token, of rows that blocks of queries share, in one launch.

In torch operations (where each token lies, its row, what it sees) it is some twenty, which cost the host more
than a short call of attention itself.
"""

import torch
import triton.language as tl

from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import find_sequence
from fsa_core.packing import row_starts
from fsa_core.sizes import power_of_two, search_steps

# Ids that a program writes.
IDS_AT_ONCE = 2048
SLOTS_AT_ONCE = 128


@kernel
def _expand(
    rows_ptr,
    ids_ptr,
    row_starts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_q_tokens,
    num_rows,
    num_slots,
    query_block_size,
    num_sequences,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """ids [heads, num_q_tokens, num_slots]: those of rows [heads, num_rows, num_slots] that a token sees."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    head = tl.program_id(1).to(tl.int64)
    mask = (tokens < num_q_tokens)[:, None] & (slots < num_slots)[None, :]
    sequence = find_sequence(cu_seqlens_q_ptr, tokens, num_sequences, search_steps)
    row = (tokens - tl.load(cu_seqlens_q_ptr + sequence)) // query_block_size
    if not ONE_SEQUENCE:
        row += tl.load(row_starts_ptr + sequence).to(tl.int32)
    # Starts that nobody validated lead to no memory of others.
    exists = mask & ((row >= 0) & (row < num_rows))[:, None]
    row_places = (head * num_rows + row) * num_slots
    ids = tl.load(rows_ptr + row_places[:, None] + slots[None, :], mask=exists, other=-1)
    if CAUSAL:
        num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence)
        position = tokens + num_keys - tl.load(cu_seqlens_q_ptr + sequence + 1)
        num_visible = tl.minimum(num_keys, tl.maximum(position + 1, 0))
        num_visible_blocks = (num_visible + BLOCK_SIZE - 1) // BLOCK_SIZE
        ids = tl.where(ids < num_visible_blocks[:, None], ids, -1)
    places = (head * num_q_tokens + tokens) * num_slots
    tl.store(ids_ptr + places[:, None] + slots[None, :], ids, mask=mask)


def expand_rows(
    rows: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    num_q_tokens: int,
) -> torch.Tensor:
    """``fsa_core.patterns.expand_query_blocks`` of at least one token: int32 [heads, num_q_tokens, slots]."""
    heads, num_rows, num_slots = rows.shape
    num_sequences = cu_seqlens_q.numel() - 1
    ids = rows.new_empty(heads, num_q_tokens, num_slots)
    starts = row_starts(cu_seqlens_q, query_block_size) if num_sequences > 1 else cu_seqlens_q
    slots = min(power_of_two(num_slots), SLOTS_AT_ONCE)
    tokens = IDS_AT_ONCE // slots
    _expand[-(-num_q_tokens // tokens), heads, -(-num_slots // slots)](
        rows.contiguous(), ids, starts, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), num_q_tokens,
        num_rows, num_slots, query_block_size, num_sequences, search_steps(num_sequences),
        BLOCK_SIZE=block_size, CAUSAL=causal, ONE_SEQUENCE=num_sequences == 1, TOKENS=tokens, SLOTS=slots,
    )  # fmt: skip
    return ids

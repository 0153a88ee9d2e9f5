"""One look at block_indices that are as most are: right, and ascending in each row.

Checked by torch operations, a call costs the host some fifty launches, more than attention itself where there
is little to attend. Here it is one, which decides nothing but that nothing is wrong: of whatever it doubts,
the checks of ``fsa_core.validation`` find out what it is.
"""

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import kernel
from fsa_core.kernels.primitives import find_sequence
from fsa_core.sizes import power_of_two, search_steps

# Ids that a program looks at together, and starts of sequences.
IDS_AT_ONCE = 2048
SLOTS_AT_ONCE = 128
STARTS_AT_ONCE = tl.constexpr(256)


@kernel
def _doubt(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    doubt_ptr,
    num_q_tokens,
    num_k_tokens,
    num_slots,
    head_stride,
    num_sequences,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Writes 1 to ``doubt_ptr`` unless the ids of ROWS tokens under a head are allowed, ascend, and then end.

    One of the programs looks at cu_seqlens, which all others believe.
    """
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = tokens < num_q_tokens
    sequence = find_sequence(cu_seqlens_q_ptr, tokens, num_sequences, search_steps)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence)
    if CAUSAL:
        position = tokens + num_keys - tl.load(cu_seqlens_q_ptr + sequence + 1)
        num_keys = tl.minimum(num_keys, tl.maximum(position + 1, 0))
    num_allowed = (num_keys + BLOCK_SIZE - 1) // BLOCK_SIZE
    rows = tl.program_id(1).to(tl.int64) * head_stride + tokens.to(tl.int64) * num_slots
    doubts = tl.zeros((ROWS,), tl.int32)
    for first_slot in range(0, num_slots, SLOTS):
        slots = first_slot + tl.arange(0, SLOTS)
        mask = exists[:, None] & (slots < num_slots)[None, :]
        ptrs = indices_ptr + rows[:, None] + slots[None, :]
        ids = tl.load(ptrs, mask=mask, other=-1)
        before = tl.load(ptrs - 1, mask=mask & (slots > 0)[None, :], other=-1)
        ascends = ((before >= 0) & (before < ids)) | (slots == 0)[None, :]
        fine = (ids == -1) | ((ids >= 0) & (ids < num_allowed[:, None]) & ascends)
        doubts += tl.sum((~fine).to(tl.int32), 1)
    count = tl.sum(doubts, 0)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        count += _doubted_starts(cu_seqlens_q_ptr, num_sequences, num_q_tokens)
        count += _doubted_starts(cu_seqlens_k_ptr, num_sequences, num_k_tokens)
    if count > 0:
        tl.store(doubt_ptr, 1)


@triton.jit
def _doubted_starts(cu_seqlens_ptr, num_sequences, num_tokens):
    """How many starts are wrong: the first is 0, none is below the one before, the last is ``num_tokens``."""
    wrong = tl.zeros((STARTS_AT_ONCE,), tl.int32)
    for first in range(0, num_sequences, STARTS_AT_ONCE):
        sequences = first + tl.arange(0, STARTS_AT_ONCE)
        mask = sequences < num_sequences
        starts = tl.load(cu_seqlens_ptr + sequences, mask=mask, other=0)
        ends = tl.load(cu_seqlens_ptr + sequences + 1, mask=mask, other=0)
        wrong += (ends < starts).to(tl.int32)
    ends_wrong = (tl.load(cu_seqlens_ptr) != 0) | (tl.load(cu_seqlens_ptr + num_sequences) != num_tokens)
    return tl.sum(wrong, 0) + ends_wrong.to(tl.int32)


def certainly_valid(
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_k_tokens: int,
    *,
    block_size: int,
    causal: bool,
) -> bool:
    """Whether rows ascend and then end, and they and both cu_seqlens are right. Waits for the device.

    block_indices: int32 [heads, num_q_tokens, num_slots], of at least one token, each head's contiguous;
    cu_seqlens int32 [num_sequences + 1], whatever they hold. False decides nothing.
    """
    heads, num_q_tokens, num_slots = block_indices.shape
    num_sequences = cu_seqlens_q.numel() - 1
    slots = min(power_of_two(num_slots), SLOTS_AT_ONCE)
    rows = IDS_AT_ONCE // slots
    doubt = torch.zeros(1, dtype=torch.int32, device=block_indices.device)
    _doubt[-(-num_q_tokens // rows), heads](
        block_indices, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), doubt, num_q_tokens,
        num_k_tokens, num_slots, block_indices.stride(0), num_sequences, search_steps(num_sequences),
        BLOCK_SIZE=block_size, CAUSAL=causal, ROWS=rows, SLOTS=slots,
    )  # fmt: skip
    return not doubt.item()

"""What the index says of each work item, where a kernel reads nothing else."""

from collections.abc import Callable

import pytest
import torch

from fsa_core.kernels.index import RECORD_PAIRS_BIT, Inversion, invert
from fsa_core.plan import RECORD_INTS, SLOT_BITS, counter_ints, num_segments
from tests.fsa_core.conftest import Case

PAIRS_PER_ITEM, CHUNK_TOKENS = 5, 48
FIRST_TOKEN, NUM_TOKENS = 3, 150


def indexed(case: Case) -> Inversion:
    """Of tokens from FIRST_TOKEN on, with a record of each item."""
    p = case.problem

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=case.q.device)

    segments, rows = num_segments(p), p.index_heads * -(-NUM_TOKENS // CHUNK_TOKENS)
    inversion = Inversion(
        counts=int32(rows, segments, counter_ints(segments)),
        ranks=int32(p.index_heads, NUM_TOKENS, p.num_slots),
        used=int32(p.index_heads, NUM_TOKENS, 0),
        pairs=int32(p.index_heads, NUM_TOKENS * p.num_slots),
        offsets=int32(rows, segments + 1),
        item_offsets=int32(rows, segments + 1),
        items=int32(rows, CHUNK_TOKENS * p.num_slots, RECORD_INTS),
    )
    invert(
        inversion, case.block_indices, case.cu_seqlens_q, case.cu_seqlens_k, first_token=FIRST_TOKEN,
        num_tokens=NUM_TOKENS, first_head=0, num_heads=p.index_heads, chunk_tokens=CHUNK_TOKENS,
        block_size=p.block_size, pairs_per_item=PAIRS_PER_ITEM, causal=p.causal,
    )  # fmt: skip
    return inversion


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", ["random", "same", "empty_rows"])
def test_records_are_of_each_pair_once(make_case: Callable, distribution: str, causal: bool) -> None:
    case = make_case(
        q_lens=(70, 0, 33, 60), k_lens=(90, 20, 200, 60), num_slots=5, distribution=distribution,
        causal=causal,
    )  # fmt: skip
    p, inversion = case.problem, indexed(case)
    starts_q, starts_k = case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist()
    num_chunks = inversion.offsets.shape[0] // p.index_heads
    found = set()
    for row, num_items in enumerate(inversion.item_offsets[:, -1].tolist()):
        head, chunk = divmod(row, num_chunks)
        chunk_start = chunk * CHUNK_TOKENS
        pairs = inversion.pairs[head, chunk_start * p.num_slots :].tolist()
        for first_pair, counts, first_key, seen in inversion.items[row, :num_items].tolist():
            num_keys, num_pairs = counts % (1 << RECORD_PAIRS_BIT.value), counts >> RECORD_PAIRS_BIT.value
            assert 1 <= num_pairs <= PAIRS_PER_ITEM
            for pair in pairs[first_pair : first_pair + num_pairs]:
                token, slot = FIRST_TOKEN + chunk_start + (pair >> SLOT_BITS), pair % (1 << SLOT_BITS)
                found.add((head, token, slot))
                sequence = int((case.cu_seqlens_q[1:] <= token).sum())
                length = starts_k[sequence + 1] - starts_k[sequence]
                block_start = case.block_indices[head, token, slot].item() * p.block_size
                assert first_key == starts_k[sequence] + block_start
                assert num_keys == min(length - block_start, p.block_size)
                position = FIRST_TOKEN + chunk_start + length - starts_q[sequence + 1]
                assert seen == (position if causal else length - 1) - block_start
    ids = case.block_indices[:, FIRST_TOKEN : FIRST_TOKEN + NUM_TOKENS]
    chosen = {(head, FIRST_TOKEN + token, slot) for head, token, slot in (ids >= 0).nonzero().tolist()}
    assert found == chosen

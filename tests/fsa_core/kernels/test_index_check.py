"""What the fast check of block_indices accepts is right and ascending, and it accepts all of that."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_core.kernels.index_check import certainly_valid
from tests.fsa_core.test_validation import calls, offenders, valid_ids


def verdict(device, ids, cu_seqlens_q, cu_seqlens_k, num_k_tokens, causal):
    tensors = (
        torch.as_tensor(x, dtype=torch.int32, device=device) for x in (ids, cu_seqlens_q, cu_seqlens_k)
    )
    return certainly_valid(*tensors, num_k_tokens, block_size=16, causal=causal)


def starts(lens):
    return np.cumsum([0, *lens])


def ascends(row):
    used = [value for value in row if value >= 0]
    return used == sorted(set(used)) and used == list(row[: len(used)])


@settings(max_examples=100)
@given(call=calls(), closes_gaps=st.booleans())
def test_what_it_accepts_is_what_is_right_and_ascends(device, call, closes_gaps):
    call["query_block_size"] = 1
    rng = np.random.default_rng(call["seed"])
    ids = valid_ids(rng, **call)
    if ids.shape[1] == 0:
        return
    if closes_gaps:
        # Read without a sign, an unused slot is the largest id.
        ids = np.sort(ids.view(np.uint32)).view(np.int32)
    for _ in range(call["corruptions"]):
        place = tuple(rng.integers(size) for size in ids.shape)
        ids[place] = rng.choice([-7, -2, 0, 1, 2, 3, 2**31 - 1])
    q_lens, k_lens, causal = call["q_lens"], call["k_lens"], call["causal"]
    offender = next(offenders(ids, q_lens, k_lens, 16, 1, causal), None)
    expected = offender is None and all(ascends(row) for head in ids.tolist() for row in head)
    assert verdict(device, ids, starts(q_lens), starts(k_lens), sum(k_lens), causal) == expected


@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k"),
    [
        ((1, 4, 8), (0, 4, 8)),
        ((0, 9, 8), (0, 4, 8)),
        ((0, 4, 7), (0, 4, 8)),
        ((0, 4, 9), (0, 4, 8)),
        ((0, 4, 8), (-1, 4, 8)),
        ((0, 4, 8), (0, 12, 8)),
        ((0, 4, 8), (0, 4, 2**31 - 1)),
        ((0, -(2**31), 8), (0, 4, 8)),
    ],
)
def test_wrong_starts_are_doubted(device, cu_seqlens_q, cu_seqlens_k):
    ids = np.full((1, 8, 2), -1)
    assert verdict(device, ids, (0, 4, 8), (0, 4, 8), 8, causal=True)
    assert not verdict(device, ids, cu_seqlens_q, cu_seqlens_k, 8, causal=True)


@pytest.mark.parametrize("place", [0, 255, 256, 299])
def test_starts_of_any_sequence_are_looked_at(device, place):
    good = starts([2] * 300)
    bad = good.copy()
    bad[place + 1 : -1] -= 3 + 2 * place
    ids = np.full((2, 600, 1), -1)
    assert verdict(device, ids, good, good, 600, causal=False)
    assert verdict(device, ids, bad, good, 600, causal=False) == (place == 299)


@pytest.mark.parametrize(("head", "token", "slot"), [(0, 0, 0), (1, 299, 199), (1, 150, 128), (0, 299, 127)])
def test_ids_of_any_place_are_looked_at(device, head, token, slot):
    ids = np.broadcast_to(np.arange(200), (2, 300, 200)).copy()
    one = starts([300]), starts([4000])
    assert verdict(device, ids, *one, 4000, causal=True)
    ids[head, token, slot] += 1 if slot < 199 else 100
    assert not verdict(device, ids, *one, 4000, causal=True)

"""The index of the gradients of keys against a stable sort."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from fsa_core.kernels import sorted_index
from fsa_core.kernels.replay import Memory
from fsa_core.kernels.sorted_index import SortedIndex, new_sorted_index, sort_pairs
from fsa_core.plan import SLOT_BITS, num_segments
from tests.fsa_core.conftest import Case

PAIRS_PER_ITEM = 5
pytestmark = pytest.mark.usefixtures("language")


def indexed(
    case: Case, *, first_token: int, num_tokens: int, chunk_tokens: int, slot_bits: int = SLOT_BITS
) -> SortedIndex:
    """Of every second head, the group being shorter than the buffers are for."""
    p = case.problem
    index = new_sorted_index(
        Memory(case.q), num_heads=p.index_heads // 2, num_tokens=num_tokens + 3, chunk_tokens=chunk_tokens,
        num_slots=p.num_slots, num_segments=num_segments(p), max_items=chunk_tokens * p.num_slots,
    )  # fmt: skip
    sort_pairs(
        index, case.block_indices, case.cu_seqlens_q, case.cu_seqlens_k, first_token=first_token,
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, first_head=1, head_step=2,
        block_size=p.block_size, pairs_per_item=PAIRS_PER_ITEM, slot_bits=slot_bits,
    )  # fmt: skip
    return index


def sorted_lists(case: Case, head: int, first_token: int, end: int, slot_bits: int) -> list[list[int]]:
    """Of each segment the pairs of some tokens under a head, by token and slot."""
    p, starts_k = case.problem, case.cu_seqlens_k.tolist()
    found: list[list[int]] = [[] for _ in range(num_segments(p))]
    for token in range(first_token, end):
        sequence = int((case.cu_seqlens_q[1:] <= token).sum())
        first_segment = starts_k[sequence] // p.block_size + sequence
        for slot, block in enumerate(case.block_indices[head, token].tolist()):
            if block >= 0:
                found[first_segment + block].append((token - first_token) << slot_bits | slot)
    return found


def check(
    case: Case, *, first_token: int, num_tokens: int, chunk_tokens: int, slot_bits: int = SLOT_BITS
) -> None:
    sizes = {"first_token": first_token, "num_tokens": num_tokens, "chunk_tokens": chunk_tokens}
    index = indexed(case, **sizes, slot_bits=slot_bits)
    num_chunks = index.offsets.shape[0] // index.ranks.shape[0]
    pairs = index.pairs.flatten().tolist()
    for row, offsets in enumerate(index.offsets.tolist()):
        head, chunk = divmod(row, num_chunks)
        start = first_token + chunk * chunk_tokens
        end = min(start + chunk_tokens, first_token + num_tokens)
        expected = sorted_lists(case, 1 + 2 * head, start, end, slot_bits)
        assert [pairs[a:b] for a, b in pairwise(offsets)] == expected
        counts = [-(-len(found) // PAIRS_PER_ITEM) for found in expected]
        owners = [segment for segment, count in enumerate(counts) for _ in range(count)]
        assert index.item_offsets[row].diff().tolist() == counts
        assert index.split_offsets[row].diff().tolist() == [n if n > 1 else 0 for n in counts]
        assert index.item_segment[row, : len(owners)].tolist() == owners
    chosen = index.ranks[:, :num_tokens] >= 0
    ids = case.block_indices[1::2, first_token : first_token + num_tokens]
    assert torch.equal(chosen, ids >= 0)


@pytest.mark.parametrize("distribution", ["random", "ragged", "same", "empty_rows"])
def test_pairs_lie_by_block_and_then_by_token_and_slot(make_case: Callable, distribution: str) -> None:
    case = make_case(q_lens=(150, 0, 47), num_slots=5, distribution=distribution, index_heads=2)
    check(case, first_token=0, num_tokens=197, chunk_tokens=200)


def test_a_long_chunk_leaves_slots_only_the_bits_they_need(make_case: Callable) -> None:
    case = make_case(q_lens=(70, 20), num_slots=4, index_heads=2)
    check(case, first_token=0, num_tokens=90, chunk_tokens=90, slot_bits=2)


def test_chunks_of_a_group_of_tokens_are_sorted_apart(make_case: Callable) -> None:
    case = make_case(q_lens=(90, 60), num_slots=3, index_heads=4, num_kv_heads=4)
    check(case, first_token=40, num_tokens=100, chunk_tokens=31)


@pytest.mark.parametrize("tokens", [1024 * n for n in (1, 8, 20, 40, 60, 63, 64, 80, 128, 1024)])
def test_no_round_of_few_strips(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Of 16 slots, blocks of 64 and 4 heads, on 132 multiprocessors."""
    monkeypatch.setattr(sorted_index, "PAIRS_IN_TILE", 1024)
    monkeypatch.setattr(sorted_index, "multiprocessors", lambda _device: 132)
    at_once, tiles, segments = 132 * sorted_index.STRIPS_AT_ONCE, tokens // 64, tokens // 64 + 1
    strips, strip_tiles = sorted_index._strips_of(tokens * 16, segments, 4, torch.device("cuda"))
    assert strips * strip_tiles >= tiles > (strips - 1) * strip_tiles
    assert strips == tiles or strips * segments * 3 <= tokens * 16 + segments * 3
    rounds = -(-4 * strips // at_once)
    # All tiles, in rounds that are full but for one tile a strip.
    assert rounds * strip_tiles <= -(-4 * tiles // at_once) + 1


def test_strips_of_several_tiles(make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 tiles of 32 pairs, 7 a strip, for 71 segments."""
    monkeypatch.setattr(sorted_index, "PAIRS_IN_TILE", 32)
    case = make_case(q_lens=(60,), k_lens=(16 * 70,), num_slots=6, block_size=16, index_heads=2)
    index = indexed(case, first_token=0, num_tokens=60, chunk_tokens=60)
    assert index.counts.shape[1] == 2
    check(case, first_token=0, num_tokens=60, chunk_tokens=60)


def test_more_strips_than_are_added_up_at_once(make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_index, "PAIRS_IN_TILE", 32)
    monkeypatch.setattr(sorted_index, "STRIPS_IN_TILE", 4)
    case = make_case(q_lens=(80,), num_slots=4, distribution="same", index_heads=2)
    assert indexed(case, first_token=0, num_tokens=80, chunk_tokens=80).counts.shape[1] > 4
    check(case, first_token=0, num_tokens=80, chunk_tokens=80)


def test_segments_whose_keys_take_64_bits(make_case: Callable, device: torch.device) -> None:
    """They are sorted beside their places."""
    if device.type == "cpu":
        pytest.skip("the interpreter takes a minute for every million segments")
    case = make_case(q_lens=(9,), num_slots=3, index_heads=2)
    p = case.problem
    index = new_sorted_index(
        Memory(case.q), num_heads=2, num_tokens=9, chunk_tokens=9, num_slots=3, num_segments=2**23,
        max_items=27,
    )  # fmt: skip
    sort_pairs(
        index, case.block_indices, case.cu_seqlens_q, case.cu_seqlens_k, first_token=0, num_tokens=9,
        chunk_tokens=9, first_head=0, head_step=1, block_size=p.block_size, pairs_per_item=PAIRS_PER_ITEM,
    )  # fmt: skip
    for head in range(2):
        expected = [pair for found in sorted_lists(case, head, 0, 9, SLOT_BITS) for pair in found]
        first = int(index.offsets[head, 0])
        assert index.pairs.flatten()[first : first + len(expected)].tolist() == expected

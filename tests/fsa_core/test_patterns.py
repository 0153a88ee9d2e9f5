import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import fsa_core.block_mask
import fsa_core.vertical_slash
from fsa_core.api import dense_attention, selected_attention
from fsa_core.block_mask import BlockMask
from fsa_core.errors import InputError
from fsa_core.patterns import (
    all_blocks,
    expand_query_blocks,
    from_block_mask,
    from_csr,
    from_vertical_slash,
)
from fsa_core.validation import validate_compact, validate_selected
from tests.fsa_core.conftest import visible_keys

LENS = {"square": ((50, 1, 0, 33), None), "chunked prefill": ((20, 5), (90, 64))}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_a_row_of_a_query_block_stands_for_each_of_its_queries(make_case, lens, query_block_size, causal):
    """Against a dense mask: what the last query of a block selects, each query sees up to itself."""
    q_lens, k_lens = lens
    case = make_case(q_lens=q_lens, k_lens=k_lens, causal=causal, distribution="ragged")
    starts = case.cu_seqlens_q.tolist()
    last_of_block, row_of_token = [], []
    for start, end in itertools.pairwise(starts):
        for first in range(start, end, query_block_size):
            last = min(first + query_block_size, end) - 1
            row_of_token += [last] * (last - first + 1)
            last_of_block.append(last)
    rows = case.block_indices[:, last_of_block]
    offsets = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
    options = {"query_block_size": query_block_size, "block_size": 16, "causal": causal}
    validate_selected(case.q, case.k, case.v, rows, softmax_scale=None, **offsets, **options)
    expanded = expand_query_blocks(rows, **offsets, **options)

    own_mask = visible_keys(make_case(q_lens=q_lens, k_lens=k_lens, causal=causal, dense=True))
    expected = visible_keys(case)[:, row_of_token] & own_mask
    assert expanded.dtype == torch.int32
    assert expanded.shape == (2, sum(q_lens), 4)
    assert torch.equal(visible_keys(replace(case, block_indices=expanded)), expected)
    # A normal form passes as what it is: one row a token.
    validate_selected(
        case.q, case.k, case.v, expanded, softmax_scale=None, **offsets, **(options | {"query_block_size": 1})
    )


def mask_of(pattern, case):
    """bool [num_q_heads, num_q_tokens, num_k_tokens] of what selected attention makes of the pattern."""
    options = {"query_block_size": pattern.query_block_size, "block_size": pattern.block_size}
    options |= {"causal": case.problem.causal}
    options |= {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
    validate_selected(case.q, case.k, case.v, pattern.indices, softmax_scale=None, **options)
    rows = expand_query_blocks(pattern.indices, **options)
    problem = replace(case.problem, index_heads=len(rows), block_size=pattern.block_size)
    return visible_keys(replace(case, problem=problem, block_indices=rows))


def rows_of(case, query_block_size):
    """(row, its queries, the first key of its sequence, how many keys its last query sees), in order."""
    row = 0
    lens = zip(case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist(), strict=True)
    for (q_start, k_start), (q_end, k_end) in itertools.pairwise(lens):
        for first in range(q_start, q_end, query_block_size):
            end = min(first + query_block_size, q_end)
            num_keys = k_end - k_start - (q_end - end if case.problem.causal else 0)
            yield row, slice(first, end), k_start, num_keys
            row += 1


def random_block_mask(case, heads, query_block_size, block_size, *, density=0.4):
    """bool [heads, rows, num_blocks] of blocks that a row may see, and the dense mask that it means."""
    generator = torch.Generator().manual_seed(0)
    rows = list(rows_of(case, query_block_size))
    num_blocks = max(-(-num_keys // block_size) for *_, num_keys in rows)
    mask = torch.rand(heads, len(rows), num_blocks, generator=generator) < density
    own = visible_keys(replace(case, block_indices=None))
    expected = torch.zeros(heads, *own.shape[1:], dtype=torch.bool)
    for row, queries, first_key, num_keys in rows:
        mask[:, row, -(-num_keys // block_size) :] = False
        for head, block in mask[:, row].nonzero().tolist():
            key = first_key + block * block_size
            expected[head, queries, key : key + block_size] = True
    expected = expected.repeat_interleave(case.problem.num_q_heads // heads, dim=0).to(own.device) & own
    return mask.to(own.device), expected


@pytest.fixture(params=[1, 2**20], ids=["a row at a time", "at once"])
def entries_at_once(request, monkeypatch):
    for module in (fsa_core.block_mask, fsa_core.vertical_slash):
        monkeypatch.setattr(module, "ENTRIES_AT_ONCE", request.param)


PATTERN_LENS = {"square": ((50, 1, 0, 33), None), "chunked prefill": ((20, 5), (90, 64))}


@pytest.mark.usefixtures("entries_at_once")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_block_size", [1, 16, 24])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("lens", PATTERN_LENS.values(), ids=PATTERN_LENS.keys())
def test_a_block_mask_is_its_dense_mask(make_case, lens, heads, query_block_size, causal):
    case = make_case(q_lens=lens[0], k_lens=lens[1], causal=causal)
    mask, expected = random_block_mask(case, heads, query_block_size, 16)
    pattern = from_block_mask(mask, block_size=16, query_block_size=query_block_size)
    assert torch.equal(mask_of(pattern, case), expected)


@pytest.mark.parametrize("query_block_size", [1, 16])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("lens", PATTERN_LENS.values(), ids=PATTERN_LENS.keys())
def test_ragged_rows_are_their_dense_mask(make_case, lens, heads, query_block_size):
    """FlashInfer's indptr and indices, one pair a head, ids of a row in descending order."""
    case = make_case(q_lens=lens[0], k_lens=lens[1])
    mask, expected = random_block_mask(case, heads, query_block_size, 16)
    counts = mask.sum(-1)
    assert len(counts.unique()) > 1
    ends = counts.flatten().cumsum(0).view_as(counts).int()
    first = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
    indices = torch.cat([row.nonzero()[:, 0].flip(0) for row in mask.flatten(0, 1)]).int()
    offsets = torch.cat([first, ends], dim=1)
    pattern = from_csr(offsets, indices, block_size=16, query_block_size=query_block_size)
    assert torch.equal(mask_of(pattern, case), expected)


# In sequences that follow one another, and before the first key, positions are no run.
SLASH_LENS = PATTERN_LENS | {"decode": ((1, 1, 1), (32, 21, 90)), "more queries": ((60, 3), (16, 40))}


@pytest.mark.usefixtures("entries_at_once")
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("lens", SLASH_LENS.values(), ids=SLASH_LENS.keys())
def test_vertical_slash_is_its_dense_mask_widened_to_blocks(make_case, lens, heads):
    """Columns past a sequence's end, distances past its start, and pads name no key."""
    case = make_case(q_lens=lens[0], k_lens=lens[1])
    columns = torch.tensor([[0, 3, 40, -1], [17, 61, 88, 1000], [-1, -1, -1, -1], [5, 6, 7, 8]])[:heads]
    distances = torch.tensor([[0, 20, -1], [30, 31, 5000], [0, -1, -1], [-1, -1, -1]])[:heads]
    own = visible_keys(replace(case, block_indices=None))
    exact, widened = (torch.zeros(heads, *own.shape[1:], dtype=torch.bool) for _ in range(2))
    for query, queries, first_key, num_keys in rows_of(case, 1):
        for head in range(heads):
            keys = [*columns[head].tolist(), *(num_keys - 1 - d for d in distances[head].tolist() if d >= 0)]
            for key in keys:
                if 0 <= key < num_keys:
                    start = key // 16 * 16
                    exact[head, query, first_key + key] = True
                    widened[head, queries, first_key + start : first_key + min(start + 16, num_keys)] = True
    pattern = from_vertical_slash(
        columns.int().to(own.device),
        distances.int().to(own.device),
        block_size=16,
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
    )
    got = mask_of(pattern, case)
    per_q_head = case.problem.num_q_heads // heads
    assert torch.equal(got, widened.repeat_interleave(per_q_head, dim=0).to(got.device))
    assert not (exact.repeat_interleave(per_q_head, dim=0).to(got.device) & ~got).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lens",
    [*PATTERN_LENS.values(), ((30, 20), (12, 0)), ((0,), (40,))],
    ids=[*PATTERN_LENS.keys(), "more queries than keys", "no queries"],
)
def test_all_blocks_are_full_attention(make_case, lens, causal):
    case = make_case(q_lens=lens[0], k_lens=lens[1], causal=causal, dense=True)
    starts = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
    pattern = all_blocks(block_size=16, causal=causal, **starts)
    assert torch.equal(mask_of(pattern, case), visible_keys(case))
    out, lse = selected_attention(
        *(case.q, case.k, case.v, pattern.indices),
        block_size=16,
        query_block_size=16,
        causal=causal,
        **starts,
    )
    expected = dense_attention(case.q, case.k, case.v, causal=causal, **starts)
    torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-5)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: from_csr(int32([1, 2]), int32(0, 0), block_size=16),
            r"offsets\[head 0, 0\] is 1: expected the end",
        ),
        (
            lambda: from_csr(int32([0, 2], [1, 3]), int32(0, 1, 0), block_size=16),
            r"offsets\[head 1, 0\] is 1: expected the end of the head before it",
        ),
        (
            lambda: from_csr(int32([0, 2, 1, 3]), int32(0, 1, 0), block_size=16),
            r"offsets\[head 0, 2\] is 1: expected at least the one before it",
        ),
        (
            lambda: from_csr(int32([0, 2]), int32(0), block_size=16),
            "offsets ends at 2: expected 1, the number of",
        ),
        (lambda: from_csr(int32(0, 2), int32(0, 1), block_size=16), r"offsets has rank 1 \(shape \[2\]\)"),
        (
            lambda: from_csr(int32([0, 1]), int32(0).long(), block_size=16),
            "indices has dtype int64: expected",
        ),
        (lambda: from_csr(int32([]), int32(), block_size=16), r"offsets has shape \[1, 0\]"),
        (
            lambda: from_block_mask(int32([[1]]), block_size=16, query_block_size=1),
            "mask has dtype int32: expected bool",
        ),
        (
            lambda: vertical_slash(int32([0, -2]), int32([0])),
            r"vertical\[head 0, entry 1\] is -2: expected a key's position or distance, or -1",
        ),
        (lambda: vertical_slash(int32([0]), int32([-5])), r"slash\[head 0, entry 0\] is -5"),
        (
            lambda: vertical_slash(int32([0]), int32([0], [1])),
            "slash has head count 2: expected 1, that of vertical",
        ),
        (
            lambda: from_csr([[0, 1]], [0], block_size=16),
            "offsets has type list: expected torch.Tensor",
        ),
        (lambda: from_csr(int32([0, 1]), [0], block_size=16), "indices has type list"),
        (
            lambda: from_block_mask([[True]], block_size=16, query_block_size=1),
            "mask has type list: expected torch.Tensor",
        ),
        (lambda: vertical_slash([[0]], int32([0])), "vertical has type list"),
        (lambda: vertical_slash(int32([0]), None), "slash has type NoneType"),
        (lambda: all_blocks(**(BLOCKS | {"causal": None})), "causal is None: expected True or False"),
    ],
)
def test_malformed_patterns_are_refused_by_field_and_index(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert error.value.field == message.split("\\")[0].split()[0]


def vertical_slash(vertical, slash, **changes):
    options = {"block_size": 16, "cu_seqlens_q": int32(0, 4), "cu_seqlens_k": int32(0, 4)}
    return from_vertical_slash(vertical, slash, **(options | changes))


BLOCKS = {"block_size": 16, "cu_seqlens_q": int32(0, 4), "cu_seqlens_k": int32(0, 4), "causal": True}
MADE_BY_STARTS = {
    "from_vertical_slash": lambda **changes: vertical_slash(int32([0]), int32([0]), **changes),
    "all_blocks": lambda **changes: all_blocks(**(BLOCKS | changes)),
}


@pytest.mark.parametrize("make", MADE_BY_STARTS.values(), ids=MADE_BY_STARTS.keys())
@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"block_size": 0}, "INVALID_BLOCK_SIZE", "block_size is 0: expected one of 16, 32"),
        ({"block_size": None}, "INVALID_BLOCK_SIZE", "block_size is None"),
        ({"cu_seqlens_q": [0, 4]}, "INVALID_TYPE", "cu_seqlens_q has type list: expected torch.Tensor"),
        ({"cu_seqlens_k": None}, "INVALID_TYPE", "cu_seqlens_k has type NoneType"),
        ({"cu_seqlens_q": int32(0, 4).float()}, "INVALID_DTYPE", "cu_seqlens_q has dtype float32"),
        ({"cu_seqlens_k": int32([0, 4])}, "INVALID_RANK", "cu_seqlens_k has rank 2"),
        (
            {"cu_seqlens_q": int32(0), "cu_seqlens_k": int32(0)},
            "INVALID_CU_SEQLENS",
            "cu_seqlens_q has length 1: expected at least 2",
        ),
        (
            {"cu_seqlens_k": int32(0, 2, 4)},
            "INVALID_CU_SEQLENS",
            "cu_seqlens_k has length 3: expected 2, that of cu_seqlens_q",
        ),
        (
            {"cu_seqlens_q": int32(0, 4, 2), "cu_seqlens_k": int32(0, 4, 4)},
            "INVALID_CU_SEQLENS",
            "cu_seqlens_q[2] is 2: expected at least 4",
        ),
        (
            {"cu_seqlens_q": int32(0, 4, 4), "cu_seqlens_k": int32(0, 4, 2)},
            "INVALID_CU_SEQLENS",
            "cu_seqlens_k[2] is 2: expected at least 4",
        ),
        ({"cu_seqlens_q": int32(0, -4)}, "INVALID_CU_SEQLENS", "cu_seqlens_q[1] is -4: expected at least 0"),
        ({"cu_seqlens_k": int32(-1, 4)}, "INVALID_CU_SEQLENS", "cu_seqlens_k[0] is -1: expected 0"),
    ],
)
def test_starts_and_sizes_that_make_no_pattern_are_refused_by_name(make, changes, reason, message):
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(message)
    assert caught.value.field in changes


def test_sizes_of_patterns_may_be_numpys():
    for make in MADE_BY_STARTS.values():
        assert type(make(block_size=np.int64(16)).block_size) is int


def test_torchs_default_device_changes_no_verdict_on_a_mask(case_on_cpu):
    case = case_on_cpu(dense=True)
    mask, _ = random_block_mask(case, 1, 16, 16)
    pattern = BlockMask(mask, 16, 16)
    expected = validate_compact(case.q, case.k, case.v, pattern, **case.options)
    with torch.device("meta"):
        assert validate_compact(case.q, case.k, case.v, pattern, **case.options) == expected


def test_ids_that_a_pattern_may_not_name_are_refused_as_any(make_case):
    """By head, row and slot, when attention is asked for."""
    case = make_case(q_lens=(40,))
    pattern = from_csr(int32([0, 1, 3, 4]), int32(0, 1, 2, 0), block_size=16, query_block_size=16)
    with pytest.raises(InputError, match="row 1") as error:
        selected_attention(
            *(case.q, case.k, case.v, pattern.indices.to(case.q.device)), block_size=16, query_block_size=16
        )
    assert error.value.metadata["value"] == "2"

"""Decode on the CPU against the oracle, and what it refuses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fsa_core import cpu_decode
from fsa_core.decode import paged_selected_attention
from fsa_core.errors import InputError
from tests.fsa_core.conftest import DISTRIBUTIONS, PagedCase, _make_paged

SEVERAL = {"q_lens": (3, 0, 1, 5), "k_lens": (100, 30, 0, 49)}
FEW_BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.fixture
def paged_on_cpu() -> Callable[..., PagedCase]:
    return partial(_make_paged, torch.device("cpu"))


def run(paged: PagedCase, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"block_size": paged.case.problem.block_size, "softmax_scale": paged.case.problem.softmax_scale}
    return paged_selected_attention(**(paged.tensors | options | changes))


@FEW_BACKENDS
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_any_group_size_and_distribution(
    paged_on_cpu: Callable,
    assert_close_to_oracle: Callable,
    group_size: int,
    distribution: str,
    backend: str,
) -> None:
    paged = paged_on_cpu(k_lens=(100, 7, 0, 64), group_size=group_size, distribution=distribution)
    assert_close_to_oracle(*run(paged, backend=backend), paged.case)


@FEW_BACKENDS
@pytest.mark.parametrize("page_blocks", [1, 2, 4])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 80), (16, 48), (256, 32)])
def test_any_page_size_and_head_dim_with_several_tokens_a_sequence(
    paged_on_cpu: Callable,
    assert_close_to_oracle: Callable,
    head_dim: int,
    value_dim: int,
    page_blocks: int,
    backend: str,
) -> None:
    dims = {"head_dim": head_dim, "value_dim": value_dim}
    paged = paged_on_cpu(**SEVERAL, **dims, page_size=16 * page_blocks, dtype=torch.bfloat16)
    assert_close_to_oracle(*run(paged, backend=backend), paged.case)


@pytest.mark.parametrize("index_heads", [1, 2, 6])
def test_indices_of_one_head_of_kv_heads_or_of_query_heads(
    paged_on_cpu: Callable, assert_close_to_oracle: Callable, index_heads: int
) -> None:
    paged = paged_on_cpu(**SEVERAL, group_size=3, index_heads=index_heads, block_size=64, page_size=64)
    assert_close_to_oracle(*run(paged), paged.case)


def test_tokens_a_few_at_a_time_give_the_same_answer(
    paged_on_cpu: Callable, assert_close_to_oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = paged_on_cpu(**SEVERAL)
    monkeypatch.setattr(cpu_decode, "CPU_WORKSPACE_BYTES", 1)
    assert_close_to_oracle(*run(paged), paged.case)


def test_without_cu_seqlens_each_sequence_has_a_query(paged_on_cpu: Callable) -> None:
    paged = paged_on_cpu(k_lens=(100, 7, 0))
    for got, expected in zip(run(paged, cu_seqlens_q=None), run(paged), strict=True):
        assert torch.equal(got, expected)


def test_no_tokens_give_no_answer(paged_on_cpu: Callable) -> None:
    out, lse = run(paged_on_cpu(q_lens=(0, 0), k_lens=(20, 0)))
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_there_is_no_gradient(paged_on_cpu: Callable) -> None:
    paged = paged_on_cpu(k_lens=(20,))
    out, lse = run(paged, q=paged.case.q.clone().requires_grad_())
    assert not out.requires_grad
    assert not lse.requires_grad


def test_ids_and_pages_that_nobody_validated_are_ignored(
    paged_on_cpu: Callable, assert_close_to_oracle: Callable
) -> None:
    paged = paged_on_cpu(k_lens=(100, 40), distribution="ragged")
    ids = paged.case.block_indices
    wild = torch.where(ids == -1, 10**8, ids)
    table = torch.cat([paged.page_table, torch.full((2, 1), -7, dtype=torch.int32)], dim=1)
    answer = run(paged, block_indices=wild, page_table=table, validate=False)
    assert_close_to_oracle(*answer, paged.case)


@FEW_BACKENDS
@pytest.mark.parametrize("page", [77, -5])
def test_a_page_that_nobody_validated_and_that_is_none_spoils_no_other_sequence(
    paged_on_cpu: Callable, backend: str, page: int
) -> None:
    paged = paged_on_cpu(k_lens=(100, 40))
    expected = run(paged, backend=backend)
    table = paged.page_table.clone()
    table[0, 1] = page
    got = run(paged, page_table=table, backend=backend, validate=False)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(got, expected, strict=True))


@FEW_BACKENDS
@pytest.mark.parametrize("length", [129, 10**6, 2**31 - 1, -1])
def test_a_length_that_nobody_validated_and_that_has_no_room_spoils_no_other_sequence(
    paged_on_cpu: Callable, backend: str, length: int
) -> None:
    paged = paged_on_cpu(k_lens=(80, 9))
    table = paged.page_table.clone().clamp_(max=len(paged.k_cache) - 1)
    expected = run(paged, backend=backend)
    got = run(paged, page_table=table, seq_lens=ints(length, 9), backend=backend, validate=False)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(got, expected, strict=True))


@FEW_BACKENDS
def test_torchs_default_device_changes_no_bit(paged_on_cpu: Callable, backend: str) -> None:
    paged = paged_on_cpu(**SEVERAL)
    single = paged_on_cpu(k_lens=(100, 7, 0))
    expected = (*run(paged, backend=backend), *run(single, backend=backend, cu_seqlens_q=None))
    with torch.device("meta"):
        got = (*run(paged, backend=backend), *run(single, backend=backend, cu_seqlens_q=None))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# The case has q [2, 4, 64], 6 pages of 32 keys under 2 heads, 3 + 1 of them in a table of 4 columns, 80 and
# 9 keys in blocks of 16, and ids [2, 2, 4].
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"k_cache": [1.0]}, "INVALID_TYPE", "k_cache has type list: expected torch.Tensor"),
    (
        {"v_cache": zeros(6, 32, 128)},
        "INVALID_RANK",
        "v_cache has rank 3 (shape [6, 32, 128]): expected 4, [num_pages, page_size, heads, dim]",
    ),
    (
        {"v_cache": zeros(6, 16, 2, 64)},
        "INVALID_TOKENS",
        "v_cache has pages and page size [6, 16]: expected [6, 32], those of k_cache",
    ),
    (
        {"k_cache": zeros(0, 32, 2, 64), "v_cache": zeros(0, 32, 2, 64)},
        "INVALID_PAGE_SIZE",
        "k_cache has page count 0: expected at least 1",
    ),
    (
        {"k_cache": zeros(6, 0, 2, 64), "v_cache": zeros(6, 0, 2, 64)},
        "INVALID_PAGE_SIZE",
        "k_cache has page size 0: expected at least 1",
    ),
    ({"block_size": 64}, "INVALID_PAGE_SIZE", "k_cache has page size 32: expected a multiple of 64"),
    ({"block_size": 8}, "INVALID_BLOCK_SIZE", "block_size is 8: expected one of 16"),
    (
        {"k_cache": zeros(6, 32, 2, 64, dtype=torch.float16)},
        "INVALID_DTYPE",
        "k_cache has dtype float16: expected float32, that of q",
    ),
    ({"k_cache": zeros(6, 32, 2, 32)}, "INVALID_HEAD_DIM", "k_cache has head dim 32: expected 64, that of q"),
    ({"v_cache": zeros(6, 32, 1, 64)}, "INVALID_HEADS", "v_cache has head count 1: expected 2, that of k_c"),
    ({"q": zeros(2, 3, 64)}, "INVALID_HEADS", "k_cache has 2 heads, q has 3: q's must be a multiple"),
    ({"softmax_scale": 0.0}, "INVALID_SOFTMAX_SCALE", "softmax_scale is 0.0"),
    ({"page_table": zeros(2, 4)}, "INVALID_DTYPE", "page_table has dtype float32: expected int32"),
    (
        {"page_table": ints(0, 1)},
        "INVALID_RANK",
        "page_table has rank 1 (shape [2]): expected 2, [num_sequences, max_pages]",
    ),
    (
        {"page_table": ints([0, 1, 2])},
        "INVALID_PAGE_TABLE",
        "page_table has row count 1: expected 2, one for each of seq_lens",
    ),
    (
        {"page_table": ints([], [])},
        "INVALID_PAGE_TABLE",
        "page_table has column count 0: expected at least 1",
    ),
    (
        {"seq_lens": ints(80, 9, dtype=torch.int64)},
        "INVALID_DTYPE",
        "seq_lens has dtype int64: expected int32",
    ),
    (
        {"seq_lens": ints(80), "page_table": ints([0, 1, 2]), "cu_seqlens_q": None},
        "INVALID_SEQ_LENS",
        "seq_lens has length 1: expected 2, one for each token of q, since there are no cu_seqlens_q",
    ),
    (
        {"cu_seqlens_q": ints(0, 2)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_q has length 2: expected 3, one more than seq_lens",
    ),
    (
        {"cu_seqlens_q": ints(0, 1, 1)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_q[2] is 1: expected 2, the token count",
    ),
    (
        {"block_indices": zeros(3, 2, 4, dtype=torch.int32)},
        "INVALID_INDEX_SHAPE",
        "block_indices has head count 3: expected 1 or 2 or 4",
    ),
    (
        {"block_indices": zeros(2, 1, 4, dtype=torch.int32)},
        "INVALID_INDEX_SHAPE",
        "block_indices has row count 1: expected 2, one a query token",
    ),
    (
        {"seq_lens": ints(80, 129)},
        "INVALID_SEQ_LENS",
        "seq_lens[1] is 129: expected 0 to 128, 4 pages of 32 keys",
    ),
    ({"seq_lens": ints(-1, 9)}, "INVALID_SEQ_LENS", "seq_lens[0] is -1: expected 0 to 128"),
    (
        {"page_table": ints([0, 1, 6, 9], [3, 9, 9, 9])},
        "PAGE_OUT_OF_RANGE",
        "page_table[0, 2] is 6: expected 0 to 5, since its sequence's 80 keys need 3 pages",
    ),
    (
        {"page_table": ints([0, 1, 2, 9], [-1, 9, 9, 9])},
        "PAGE_OUT_OF_RANGE",
        "page_table[1, 0] is -1: expected",
    ),
    (
        {"block_indices": ints([[0, 1, -1, 5], [0, -1, -1, -1]])},
        "INDEX_OUT_OF_RANGE",
        "block_indices[head 0, token 0, slot 3] is 5: sequence 0 has 5 blocks of 16 keys",
    ),
    (
        {"block_indices": ints([[0, -1, 3, 0], [0, -1, -1, -1]])},
        "INDEX_DUPLICATE",
        "block_indices[head 0, token 0, slot 3] is 0: slot 0 has it already",
    ),
    (
        {"cu_seqlens_q": ints(0, 2, 2), "seq_lens": ints(65, 9), "block_indices": ints([[4, -1], [0, 4]])},
        "INDEX_NOT_CAUSAL",
        "block_indices[head 0, token 0, slot 0] is 4: the token's own block is 3",
    ),
]


@pytest.mark.parametrize(("changes", "reason", "message"), REFUSED)
def test_what_breaks_the_contract_is_refused_by_name(
    paged_on_cpu: Callable, changes: dict[str, Any], reason: str, message: str
) -> None:
    paged = paged_on_cpu(k_lens=(80, 9))
    with pytest.raises(InputError) as refused:
        run(paged, **changes)
    assert refused.value.reason == reason
    assert str(refused.value).startswith(message)
    assert refused.value.metadata["field"] in message


def test_a_wrong_value_is_told_with_its_place(paged_on_cpu: Callable) -> None:
    with pytest.raises(InputError) as refused:
        run(paged_on_cpu(k_lens=(80, 9)), page_table=ints([0, 1, 2, 9], [77, 9, 9, 9]))
    told = {"field": "page_table", "index": "1, 0", "value": "77", "sequence": "1"}
    assert told.items() <= refused.value.metadata.items()


def test_values_are_left_unread_on_request(paged_on_cpu: Callable) -> None:
    paged = paged_on_cpu(k_lens=(80, 9))
    run(paged, block_indices=torch.full_like(paged.case.block_indices, 99), validate=False)
    with pytest.raises(InputError, match="rank"):
        run(paged, q=paged.case.q[0], validate=False)


def test_an_unknown_backend_is_refused(paged_on_cpu: Callable) -> None:
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        run(paged_on_cpu(k_lens=(20,)), backend="gpu")

"""The kernels of decode against the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fsa_core.decode import paged_selected_attention
from fsa_core.kernels import decode
from fsa_core.kernels.decode import split
from fsa_core.kernels.replay import Replayed
from tests.fsa_core.conftest import PagedCase


def run(paged: PagedCase, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"block_size": paged.case.problem.block_size, "softmax_scale": paged.case.problem.softmax_scale}
    return paged_selected_attention(**(paged.tensors | options | {"backend": "triton"} | changes))


@pytest.fixture
def check(make_paged: Callable, assert_close_to_oracle: Callable) -> Callable[..., None]:
    def run_and_check(**options: Any) -> None:
        paged = make_paged(**options)
        assert_close_to_oracle(*run(paged), paged.case)

    return run_and_check


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


# A program takes all splits of a row where there are rows enough for the multiprocessors: always, or never.
ALWAYS, NEVER = 0, 1 << 30


@pytest.fixture(params=[ALWAYS, NEVER], ids=["all splits a program", "one split a program"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(monkeypatch, request.param)


def cut_rows(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda _device: multiprocessors)
    # Which way a known call went is remembered.
    monkeypatch.setattr(decode, "_replayed", Replayed(decode._forward))


# Groups of 96 are two programs of 48 heads.
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16, 32, 96])
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(k_lens=(100, 7), group_size=group_size, dtype=dtype)


def test_float32(check: Callable) -> None:
    check(k_lens=(100, 7), group_size=24, num_kv_heads=1, dtype=torch.float32)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 80), (128, 48), (16, 256), (192, 128)])
def test_head_dims_that_are_no_powers_of_two_and_values_of_another_width(
    check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    check(k_lens=(70,), head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("page_blocks", [1, 2, 4])
@pytest.mark.parametrize("block_size", [16, 64])
def test_pages_of_several_blocks(
    check: Callable, dtype: torch.dtype, block_size: int, page_blocks: int
) -> None:
    sizes = {"block_size": block_size, "page_size": block_size * page_blocks}
    check(k_lens=(5 * block_size + 3, block_size), num_kv_heads=1, dtype=dtype, **sizes)


# A step takes 64 of the keys of a block.
@pytest.mark.parametrize("block_size", [128, 256])
def test_blocks_of_several_steps(check: Callable, dtype: torch.dtype, block_size: int) -> None:
    sizes = {"block_size": block_size, "page_size": block_size, "num_slots": 3}
    check(k_lens=(2 * block_size + 70, 40), num_kv_heads=1, dtype=dtype, **sizes)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("distribution", ["ragged", "empty_rows"])
def test_several_tokens_a_sequence_and_rows_that_chose_little_or_nothing(
    check: Callable, dtype: torch.dtype, distribution: str
) -> None:
    lens = {"q_lens": (3, 0, 1, 5), "k_lens": (100, 30, 0, 49)}
    check(**lens, num_slots=20, distribution=distribution, dtype=dtype)


def test_the_sequence_of_a_token_among_hundreds(check: Callable) -> None:
    q_lens = [0] * 600
    q_lens[0] = q_lens[299] = 1
    q_lens[599] = 2
    check(q_lens=q_lens, k_lens=[20 * n for n in q_lens], num_kv_heads=1, dtype=torch.float16)


@pytest.mark.parametrize("index_heads", [1, 6])
def test_indices_of_one_head_or_of_query_heads(check: Callable, dtype: torch.dtype, index_heads: int) -> None:
    check(k_lens=(100, 7), group_size=3, index_heads=index_heads, dtype=dtype)


@pytest.mark.usefixtures("each_way")
def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(k_lens=(300,), num_slots=18, q_scale=16.0, dtype=dtype)


@pytest.mark.usefixtures("each_way")
def test_more_slots_than_the_splits_hold(make_paged: Callable, assert_close_to_oracle: Callable) -> None:
    paged = make_paged(k_lens=(700,), num_kv_heads=1, num_slots=600, dtype=torch.float16)
    cut = split(paged.case.problem)
    assert cut.slots > decode.SPLIT_KEYS // 16
    assert cut.num_splits == 19
    assert_close_to_oracle(*run(paged), paged.case)


# One split, whose answer needs no merge; two, and the same with more behind.
@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("num_slots", [4, 20])
def test_unused_slots_at_the_end_change_no_bit(
    make_paged: Callable, dtype: torch.dtype, num_slots: int
) -> None:
    paged = make_paged(k_lens=(400, 30), num_slots=num_slots, dtype=dtype)
    wider = torch.nn.functional.pad(paged.case.block_indices, (0, 45), value=-1)
    same(run(paged, block_indices=wider), run(paged))


def test_without_cu_seqlens_each_sequence_has_a_query(make_paged: Callable, dtype: torch.dtype) -> None:
    paged = make_paged(k_lens=(100, 7, 0), dtype=dtype)
    same(run(paged, cu_seqlens_q=None), run(paged))


def test_blocks_that_nobody_chose_are_not_read(make_paged: Callable, dtype: torch.dtype) -> None:
    paged = make_paged(k_lens=(200,), num_slots=3, page_size=16, dtype=dtype)
    expected = run(paged)
    for head, ids in enumerate(paged.case.block_indices[:, 0].tolist()):
        unchosen = [block for block in range(13) if block not in ids]
        pages = paged.page_table[0, unchosen].long()
        paged.k_cache[pages, :, head] = torch.nan
        paged.v_cache[pages, :, head] = torch.nan
    same(run(paged), expected)


def test_a_cache_is_read_where_it_lies(make_paged: Callable, dtype: torch.dtype) -> None:
    paged = make_paged(k_lens=(100, 7), dtype=dtype)
    expected = run(paged)
    both = torch.stack((paged.k_cache, paged.v_cache), dim=1)
    same(run(paged, k_cache=both[:, 0], v_cache=both[:, 1]), expected)
    heads_first = both.transpose(2, 3).contiguous().transpose(2, 3)
    same(run(paged, k_cache=heads_first[:, 0], v_cache=heads_first[:, 1]), expected)
    channels_apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (paged.k_cache, paged.v_cache)]
    wide_table = torch.cat((paged.page_table, paged.page_table), dim=1)[:, : paged.page_table.shape[1]]
    same(run(paged, k_cache=channels_apart[0], v_cache=channels_apart[1], page_table=wide_table), expected)


@pytest.mark.usefixtures("each_way")
def test_ids_and_pages_that_no_validation_has_seen_read_no_foreign_memory(
    make_paged: Callable, assert_close_to_oracle: Callable, dtype: torch.dtype
) -> None:
    paged = make_paged(k_lens=(100, 40), distribution="ragged", dtype=dtype)
    ids = paged.case.block_indices
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 7], dtype=torch.int32, device=ids.device)
    wild = wild[torch.arange(ids.numel(), device=ids.device) % 4].view_as(ids)
    spoiled = torch.where(ids == -1, wild, ids)
    answer = run(paged, block_indices=spoiled, validate=False)
    assert_close_to_oracle(*answer, paged.case)
    for page in (2**31 - 1, len(paged.k_cache), -1):
        out, lse = run(paged, page_table=torch.full_like(paged.page_table, page), validate=False)
        assert not out.any()
        assert (lse == -torch.inf).all()
    # The table ends before the sequences do.
    run(paged, page_table=paged.page_table[:, :1].contiguous(), validate=False)


def test_a_sequence_alone_gives_the_bits_it_has_in_company(
    make_paged: Callable, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    q_lens, k_lens = torch.randint(1, 4, (300,)).tolist(), torch.randint(3, 2000, (300,)).tolist()
    sizes = {"num_slots": 40, "page_size": 64, "head_dim": 128, "group_size": 4, "dtype": torch.bfloat16}
    company = make_paged(q_lens=q_lens, k_lens=k_lens, distribution="ragged", **sizes)
    out, lse = run(company)
    starts = company.case.cu_seqlens_q
    for i, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        alone = run(
            company,
            q=company.case.q[start:end],
            page_table=company.page_table[i : i + 1],
            block_indices=company.case.block_indices[:, start:end],
            seq_lens=company.seq_lens[i : i + 1].clone(),
            cu_seqlens_q=starts[:1].new_tensor([0, end - start]),
        )
        same(alone, (out[start:end], lse[start:end]))


def test_it_runs_inside_a_cuda_graph_and_follows_what_its_tensors_hold(
    make_paged: Callable, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("graphs are CUDA's")
    paged = make_paged(k_lens=(3000, 100), num_slots=16, block_size=64, page_size=64, dtype=torch.bfloat16)
    run(paged)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run(paged, validate=False)
    paged.case.q.mul_(2)
    paged.seq_lens.sub_(1)
    graph.replay()
    same(answer, run(paged))

"""Query tiles whose tokens share a row of indices, against the oracle."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import QUERY_TILE, plan_forward
from fsa_core.tiles import default_tuning, row_tile_tokens
from tests.fsa_core.conftest import Case, sharing_rows
from tests.fsa_core.kernels.conftest import gradients


@pytest.fixture
def check(
    make_case: Callable, assert_close_to_oracle: Callable, assert_gradients_close_to_oracle: Callable
) -> Callable:
    def run(query_block_size: int, **options: object) -> Case:
        case = sharing_rows(make_case(**{"dtype": torch.float16, "head_dim": 32} | options), query_block_size)
        tile = plan_forward(case.problem, path=QUERY_TILE).query_tile
        assert tile.is_row
        assert query_block_size % tile.tokens == 0
        assert_close_to_oracle(
            *selected_attention_forward(case.problem, *case.tensors, path=QUERY_TILE), case
        )
        grads, given = gradients(case, path=QUERY_TILE)
        assert_gradients_close_to_oracle(grads, case, *given)
        return case

    return run


# Tiles of 64, 32, 16, 16 and 1 tokens, and of 20 and 9, which fill no tile.
@pytest.mark.parametrize(
    ("group_size", "query_block_size"), [(1, 64), (2, 64), (3, 32), (8, 16), (64, 4), (3, 40), (8, 9)]
)
def test_every_group_size(check: Callable, group_size: int, query_block_size: int) -> None:
    check(query_block_size, q_lens=(50, 1, 0, 33), num_kv_heads=1, group_size=group_size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", ["random", "same", "ragged", "empty_rows"])
def test_every_way_to_choose_blocks(check: Callable, distribution: str, causal: bool) -> None:
    """In chunks at the end of longer sequences."""
    options = {"distribution": distribution, "causal": causal, "q_lens": (40, 21), "k_lens": (90, 64)}
    check(32, **options)


def test_more_slots_than_a_program_sorts(check: Callable) -> None:
    case = check(64, q_lens=(64, 20), k_lens=(700, 650), num_slots=41, group_size=1, num_kv_heads=1)
    sorting = replace(case.problem, query_block_size=1)
    assert plan_forward(sorting, path=QUERY_TILE).query_tile.tokens < 64


@pytest.mark.parametrize("index_heads", [1, 6])
def test_rows_for_all_heads_or_for_a_query_head(check: Callable, index_heads: int) -> None:
    check(64, q_lens=(70,), group_size=3, index_heads=index_heads)


@pytest.mark.parametrize("block_size", [64, 256])
def test_blocks_of_one_part_and_of_several_with_a_short_last_block(check: Callable, block_size: int) -> None:
    check(64, q_lens=(20,), k_lens=(2 * block_size + 7,), num_kv_heads=1, block_size=block_size)


def test_queries_before_the_first_key_see_nothing(check: Callable) -> None:
    check(32, q_lens=(30,), k_lens=(17,))


def test_float32(check: Callable) -> None:
    check(64, q_lens=(33,), dtype=torch.float32)


def test_groups_that_cut_tiles(make_case: Callable, assert_close_to_oracle: Callable) -> None:
    case = sharing_rows(make_case(q_lens=(50, 13), num_kv_heads=1, dtype=torch.float16, head_dim=32), 64)
    plan = plan_forward(case.problem, 1, QUERY_TILE)
    assert plan.group_tokens < plan.query_tile.tokens
    answer = selected_attention_forward(case.problem, *case.tensors, path=QUERY_TILE, workspace_limit_bytes=1)
    assert_close_to_oracle(*answer, case)


def test_ids_that_no_validation_has_seen_read_no_foreign_memory(
    make_case: Callable, assert_close_to_oracle: Callable
) -> None:
    case = sharing_rows(
        make_case(q_lens=(40, 24), distribution="ragged", dtype=torch.float16, head_dim=32), 32
    )
    ids = case.block_indices
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 4], dtype=torch.int32, device=ids.device)
    wild = wild[torch.arange(ids.numel(), device=ids.device) % 4].view_as(ids)
    tensors = (*case.tensors[:3], torch.where(ids == -1, wild, ids), *case.tensors[4:])
    assert_close_to_oracle(*selected_attention_forward(case.problem, *tensors, path=QUERY_TILE), case)


@pytest.mark.parametrize(
    ("query_block_size", "tokens"), [(1, 0), (8, 0), (16, 0), (17, 17), (31, 31), (37, 0), (96, 32), (33, 0)]
)
def test_tiles_lie_in_one_row_or_there_are_none(
    make_case: Callable, query_block_size: int, tokens: int
) -> None:
    p = replace(make_case().problem, query_block_size=query_block_size)
    tuning = default_tuning(p).shared
    assert tuning.rows // p.heads_per_pair == 32
    assert row_tile_tokens(p, tuning) == tokens
    assert plan_forward(p, path=QUERY_TILE).query_tile.is_row == (tokens > 0)

"""The gradient of q in query tiles by the kernel for Hopper alone: its twin's bits, and the oracle's answer.

Without such a GPU tests/hopper_grid.py compiles the kernel, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable

import pytest
import torch

from fsa_core.backward_plan import plan_backward
from fsa_core.kernels import backward, hopper
from fsa_core.plan import MIXED, QUERY_TILE
from tests.fsa_core.conftest import DISTRIBUTIONS, Case, sharing_rows
from tests.fsa_core.kernels.conftest import gradients

SIZES = {"q_lens": (150, 1, 0, 70), "block_size": 64, "head_dim": 128, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


@pytest.fixture
def check(by_twins: Callable[[], None], assert_gradients_close_to_oracle: Callable) -> Callable[..., None]:
    def run_and_check(case: Case, path: str = QUERY_TILE, **limit: int) -> None:
        from fsa_core.kernels import hopper_query_tiles

        rows = backward.query_tile_rows(case.problem, case.q.device)
        queries = plan_backward(case.problem, *limit.values(), path=path, query_rows=rows).queries
        assert hopper_query_tiles.takes(case.problem, queries.query_tile)
        grads, given = gradients(case, path=path, **limit)
        assert_gradients_close_to_oracle(grads, case, *given)
        by_twins()
        (grad_q, *_), _ = gradients(case, path=path, **limit)
        assert torch.equal(grads[0], grad_q)

    return run_and_check


# With fewer heads a tile has more tokens than this kernel takes.
@pytest.mark.parametrize("group_size", [4, 7, 8, 16, 33, 64, 128])
def test_every_group_size(make_case: Callable, check: Callable, group_size: int) -> None:
    check(make_case(**SIZES, group_size=group_size, num_kv_heads=1))


# In least memory tiles make delta, in their twins' bits.
@pytest.mark.parametrize("limit", [{}, {"workspace_limit_bytes": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (64, 128), (128, 64)])
def test_every_width(
    make_case: Callable, check: Callable, head_dim: int, value_dim: int, dtype: torch.dtype, limit: dict
) -> None:
    sizes = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    check(make_case(**SIZES | sizes, group_size=4), **limit)


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_every_block_size_with_a_short_last_block(
    make_case: Callable, check: Callable, block_size: int
) -> None:
    lens = {"q_lens": (50, 9), "k_lens": (2 * block_size + 7, block_size + 70), "block_size": block_size}
    check(make_case(**SIZES | lens, group_size=4))


@pytest.mark.parametrize("path", [QUERY_TILE, MIXED])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_to_choose_blocks(
    make_case: Callable, check: Callable, distribution: str, causal: bool, path: str
) -> None:
    lens = {"q_lens": (150, 70), "k_lens": (900, 64)}
    check(make_case(**SIZES | lens, group_size=4, distribution=distribution, causal=causal), path)


def test_blocks_chosen_for_all_heads(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES, group_size=4, index_heads=1))


@pytest.mark.parametrize("path", [QUERY_TILE, MIXED])
def test_groups_that_cut_tiles_and_heads_taken_one_after_another(
    make_case: Callable, check: Callable, path: str
) -> None:
    check(make_case(**SIZES, group_size=4), path, workspace_limit_bytes=1)


def test_queries_before_the_first_key_see_nothing(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"q_lens": (90,), "k_lens": (17,)}, group_size=4))


def test_large_logits_stay_finite_and_right(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"dtype": torch.float16}, group_size=4, q_scale=16.0))


def test_rows_that_queries_share(make_case: Callable, check: Callable) -> None:
    check(sharing_rows(make_case(**SIZES, group_size=4, num_slots=9), 64))


def test_more_tiles_than_programs(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"q_lens": (3000, 700)}, group_size=16, num_kv_heads=2))


def test_the_same_bits_on_every_run(make_case: Callable) -> None:
    case = make_case(**SIZES | {"q_lens": (3000, 500)}, group_size=4, num_slots=8)
    (first, _), (again, _) = gradients(case, path=MIXED), gradients(case, path=MIXED)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

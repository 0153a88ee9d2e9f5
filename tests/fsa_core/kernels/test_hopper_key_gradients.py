"""The gradients of k and v by the kernel that is for Hopper alone: its twin's bits, and the oracle's answer.

Without such a GPU tests/hopper_grid.py compiles the kernel, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from fsa_core import backward_plan
from fsa_core.backward_plan import plan_backward
from fsa_core.kernels import backward, hopper
from fsa_core.plan import KV_MAJOR, MIXED, PATHS
from tests.fsa_core.conftest import DISTRIBUTIONS, Case
from tests.fsa_core.kernels.conftest import gradients


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


@pytest.fixture
def check(
    make_case: Callable, by_twins: Callable[[], None], assert_gradients_close_to_oracle: Callable
) -> Callable:
    from fsa_core.kernels import hopper_key_gradients

    def run(limit_bytes: int | None = None, path: str = MIXED, **options: object) -> Case:
        sizes = {"q_lens": (90, 1, 0, 33), "block_size": 64, "head_dim": 128, "dtype": torch.bfloat16}
        case = make_case(**sizes | options)
        limit = {} if limit_bytes is None else {"workspace_limit_bytes": limit_bytes}
        plan = plan_backward(case.problem, *limit.values(), path=path)
        assert hopper_key_gradients.takes(case.problem, plan.keys)
        grads, given = gradients(case, path=path, **limit)
        assert_gradients_close_to_oracle(grads, case, *given)
        by_twins()
        twins, _ = gradients(case, path=path, **limit)
        assert all(torch.equal(x, y) for x, y in zip(grads[1:], twins[1:], strict=True))
        return case

    return run


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans are remembered; those made with other constants must not be."""
    backward.planned.cache_clear()
    yield
    backward.planned.cache_clear()


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16, 33, 64])
def test_every_group_size(check: Callable, group_size: int) -> None:
    check(group_size=group_size, num_kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (64, 128), (128, 64)])
def test_every_width(check: Callable, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_every_block_size_with_a_short_last_block(check: Callable, block_size: int) -> None:
    check(block_size=block_size, q_lens=(20, 9), k_lens=(2 * block_size + 7, block_size + 70))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_to_choose_blocks(check: Callable, distribution: str, causal: bool) -> None:
    check(distribution=distribution, causal=causal, q_lens=(150, 70), k_lens=(300, 64))


@pytest.mark.parametrize("index_heads", [1, 6])
def test_blocks_chosen_for_all_heads_or_for_a_query_head(check: Callable, index_heads: int) -> None:
    check(group_size=3, index_heads=index_heads)


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("pairs", [1, 100])
def test_a_popular_block_is_many_items(check: Callable, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(backward_plan, "ITEM_PAIRS", pairs)
    check(distribution="same", q_lens=(400, 40))


def test_a_tiny_workspace_takes_keys_in_ranges_and_tokens_in_chunks(check: Callable) -> None:
    case = check(limit_bytes=1, q_lens=(70, 33))
    assert plan_backward(case.problem, 1, MIXED).keys.has_sums


@pytest.mark.parametrize("path", [path for path in PATHS if path != MIXED])
def test_every_path_of_the_gradients_of_q(check: Callable, path: str) -> None:
    check(limit_bytes=1, path=path)


def test_large_logits(check: Callable) -> None:
    check(q_scale=16.0, dtype=torch.float16)


def test_the_same_bits_on_every_run(make_case: Callable) -> None:
    options = {"head_dim": 128, "block_size": 64, "dtype": torch.bfloat16, "num_slots": 8}
    case = make_case(q_lens=(3000, 500), **options)
    (first, _), (again, _) = gradients(case, path=MIXED), gradients(case, path=MIXED)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_bits_of_five_products_in_seven(make_case: Callable) -> None:
    """Whether shares of grad_q are made as well, which the twin does, is no matter to k and v."""
    case = make_case(q_lens=(700, 90), head_dim=128, block_size=64, dtype=torch.bfloat16, num_slots=8)
    assert plan_backward(case.problem, path=KV_MAJOR).keys.with_queries
    (five, _), (seven, _) = gradients(case, path=KV_MAJOR), gradients(case, path=MIXED)
    assert all(torch.equal(a, b) for a, b in zip(five[1:], seven[1:], strict=True))

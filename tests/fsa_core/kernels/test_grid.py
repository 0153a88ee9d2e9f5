"""Every shape of the contract, the forward kernels and those of the gradients, against the oracle."""

from collections.abc import Callable

import pytest
import torch

from fsa_core.problem import BLOCK_SIZES
from tests.fsa_core.conftest import DISTRIBUTIONS

GROUP_SIZES = (1, 2, 3, 4, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


@pytest.fixture(params=["forward", "gradients"])
def check(request: pytest.FixtureRequest) -> Callable:
    return request.getfixturevalue(f"check_{request.param}")


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(q_lens=(33,), group_size=group_size, num_kv_heads=1, head_dim=32, dtype=dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(check: Callable, dtype: torch.dtype, head_dim: int) -> None:
    check(q_lens=(33,), group_size=3, num_kv_heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (64, 80), (16, 256)])
def test_values_of_another_width(check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    check(q_lens=(33,), num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_with_a_short_last_block(
    check: Callable, dtype: torch.dtype, block_size: int
) -> None:
    check(q_lens=(20,), k_lens=(2 * block_size + 7,), num_kv_heads=1, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_way_to_choose_blocks(check: Callable, distribution: str, causal: bool) -> None:
    check(q_lens=(40, 23), distribution=distribution, causal=causal, dtype=torch.float16, head_dim=32)


@pytest.mark.parametrize("index_heads", [1, 2, 6])
def test_blocks_chosen_for_all_heads_a_kv_head_or_a_query_head(check: Callable, index_heads: int) -> None:
    check(
        q_lens=(40,), num_kv_heads=2, group_size=3, index_heads=index_heads, dtype=torch.float16, head_dim=32
    )


def test_packed_sequences_of_any_length(check: Callable) -> None:
    check(q_lens=(1, 0, 17, 5, 0), k_lens=(70, 9, 17, 64, 0), head_dim=32, dtype=torch.float16)


def test_queries_before_the_first_key_see_nothing(check: Callable) -> None:
    check(q_lens=(40,), k_lens=(17,), head_dim=32, dtype=torch.float16)


def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(q_scale=16.0, dtype=dtype)


@pytest.mark.parametrize("head_dim", [32, 256])
def test_float32(check: Callable, head_dim: int) -> None:
    check(q_lens=(33,), num_kv_heads=1, dtype=torch.float32, head_dim=head_dim, block_size=64)

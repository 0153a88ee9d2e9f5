"""Sliding-window attention by its kernels, forward and backward, against the oracle."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.nsa.functional import sliding_window_attention
from fsa_core.nsa.reference import sliding_window_attention_reference
from tests.fsa_core.nsa.conftest import SMALL, Call, assert_close_to_oracle, eager_attention
from tests.fsa_core.nsa.conftest import _make_call as make_call

LENS = {
    "packed, empty": ((90, 0, 5, 33), None),
    "chunked prefill and decode": ((40, 1, 1), (160, 65, 9)),
    "more queries than keys": ((30, 20), (12, 0)),
}


@pytest.fixture
def check(device: torch.device) -> Callable[..., None]:
    """Answers and gradients err at most twice as eager attention does, and some roundings."""

    def run(window: int = SMALL.window, **options: object) -> None:
        call = make_call(device, config=replace(SMALL, window=window), **options)
        rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
        mask = visible_keys(call)

        def kernel(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return sliding_window_attention(
                *operands,
                config=call.config,
                cu_seqlens_q=call.cu_seqlens_q,
                cu_seqlens_k=call.cu_seqlens_k,
                softmax_scale=call.softmax_scale,
                backend="triton",
            )

        assert_close_to_oracle(
            kernel,
            lambda *operands: eager_attention(*operands, mask, call.softmax_scale),
            lambda *operands: sliding_window_attention_reference(*operands, *rest),
            (call.q, call.k, call.v),
        )

    return run


def visible_keys(call: Call) -> torch.Tensor:
    """bool [num_q_tokens, num_k_tokens]: the key is one of the last ``window`` up to the query."""
    masks = []
    lens = (x.diff().tolist() for x in (call.cu_seqlens_q, call.cu_seqlens_k))
    for q_len, k_len in zip(*lens, strict=True):
        distance = torch.arange(q_len)[:, None] + k_len - q_len - torch.arange(k_len)
        masks.append((distance >= 0) & (distance < call.config.window))
    return torch.block_diag(*masks).bool().to(call.q.device)


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_sequences_of_any_length(check: Callable, dtype: torch.dtype, lens: tuple) -> None:
    check(q_lens=lens[0], k_lens=lens[1], dtype=dtype, group_size=3)


# Of one key; narrower than a step; with steps that all rows see whole between those at both ends; wider
# than the sequence, and than 32 bits.
@pytest.mark.parametrize(("window", "q_len"), [(1, 20), (100, 200), (300, 20), (300, 450), (2**40, 150)])
def test_windows_of_any_size(check: Callable, window: int, q_len: int) -> None:
    check(window, q_lens=(q_len,), k_lens=(450,), num_kv_heads=1, group_size=2, dtype=torch.float16)


def test_float32(check: Callable) -> None:
    check(q_lens=(150,), dtype=torch.float32)


# Tiles of whole tokens that fill their rows, that do not, and of a part of a token's heads.
@pytest.mark.parametrize("group_size", [1, 3, 130])
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(4, q_lens=(6,), group_size=group_size, num_kv_heads=1, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 48), (192, 128), (16, 256)])
def test_head_dims_that_are_no_powers_of_two_and_values_of_another_width(
    check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    check(q_lens=(60,), num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(q_scale=16.0, q_lens=(100,), dtype=dtype)

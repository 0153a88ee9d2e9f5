"""Attention over windows by its kernels, forward and backward, against the oracle."""

from collections.abc import Callable

import pytest
import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import compressed_attention
from fsa_core.nsa.reference import compressed_attention_reference
from tests.fsa_core.nsa.conftest import SMALL, Call, assert_close_to_oracle, eager_attention
from tests.fsa_core.nsa.conftest import _make_call as make_call

LENS = {
    "packed, empty, shorter than a window": ((90, 0, 5, 33), None),
    "chunked prefill and decode": ((40, 1, 1), (160, 65, 9)),
    "more queries than keys": ((30, 20), (12, 0)),
}


@pytest.fixture
def check(device: torch.device) -> Callable[..., None]:
    """Answers and gradients err at most twice as eager attention does, and some roundings."""

    def run(**options: object) -> None:
        call = make_call(device, **options)
        rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
        mask = visible_windows(call)

        def kernel(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return compressed_attention(
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
            lambda *operands: compressed_attention_reference(*operands, *rest),
            (call.q, call.k_cmp, call.v_cmp),
        )

    return run


def visible_windows(call: Call) -> torch.Tensor:
    """bool [num_q_tokens, num_windows]: the window's last key is not after the query."""
    masks = []
    for q_len, k_len in zip(
        call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True
    ):
        position = torch.arange(q_len)[:, None] + k_len - q_len
        last_key = torch.arange(k_len)[call.config.kernel_size - 1 :: call.config.stride]
        masks.append(last_key <= position)
    return torch.block_diag(*masks).bool().to(call.q.device)


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_sequences_of_any_length(check: Callable, dtype: torch.dtype, lens: tuple) -> None:
    check(q_lens=lens[0], k_lens=lens[1], dtype=dtype, group_size=3)


def test_float32(check: Callable) -> None:
    check(q_lens=(150,), dtype=torch.float32, group_size=2)


# Tiles of 128, 42 and 2 tokens, and two programs a token.
@pytest.mark.parametrize("group_size", [1, 3, 64, 150])
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(q_lens=(15,), group_size=group_size, num_kv_heads=1, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 48), (192, 128), (16, 256)])
def test_head_dims_that_are_no_powers_of_two_and_values_of_another_width(
    check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    check(q_lens=(60,), num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (16, 16), (48, 16)])
def test_windows_of_any_size(check: Callable, kernel_size: int, stride: int) -> None:
    config = NSAConfig(kernel_size=kernel_size, stride=stride, block_size=16)
    check(q_lens=(100, 37), num_kv_heads=1, dtype=torch.float16, config=config)


def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(q_scale=16.0, q_lens=(100,), dtype=dtype)


def test_a_future_key_changes_no_earlier_answer(device: torch.device) -> None:
    call = make_call(device, q_lens=(160,), dtype=torch.float16)
    k_cmp = call.k_cmp.clone()
    k_cmp[20:] = torch.nan  # windows from key 80 on: their last keys are 87 and later
    options = {"config": SMALL, "softmax_scale": call.softmax_scale, "backend": "triton"}
    spoilt, _ = compressed_attention(call.q, k_cmp, call.v_cmp, **options)
    right, _ = compressed_attention(call.q, call.k_cmp, call.v_cmp, **options)
    assert torch.equal(spoilt[:87], right[:87])
    assert spoilt[87:].isnan().all()


def test_a_request_alone_gives_the_bits_it_has_in_company(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    lens = torch.randint(1, 900, (20,)).tolist()
    company = make_call(device, q_lens=lens, dtype=torch.bfloat16, head_dim=128)
    options = {"config": SMALL, "softmax_scale": company.softmax_scale}
    starts = {"cu_seqlens_q": company.cu_seqlens_q, "cu_seqlens_k": company.cu_seqlens_k}
    out, lse = compressed_attention(company.q, company.k_cmp, company.v_cmp, **starts, **options)
    first_window = 0
    for start, length in zip(company.cu_seqlens_q.tolist(), lens, strict=False):
        windows = slice(first_window, first_window + len(range(8, length + 1, 4)))
        rows, first_window = slice(start, start + length), windows.stop
        alone = compressed_attention(
            company.q[rows], company.k_cmp[windows], company.v_cmp[windows], **options
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone[1], lse[rows])

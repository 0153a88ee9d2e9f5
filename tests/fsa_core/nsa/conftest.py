"""Calls of the NSA operator that are valid by construction, and bounds of their errors."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import compressed_attention, sliding_window_attention
from fsa_core.nsa.reference import (
    compress_reference,
    compressed_attention_reference,
    pool_mean,
    sliding_window_attention_reference,
)

Answer = tuple[torch.Tensor, torch.Tensor]

SMALL = NSAConfig(kernel_size=8, stride=4, block_size=16, top_k=3, num_local_blocks=1, window=20)


@dataclass(frozen=True)
class Call:
    """The tensors of one call; k_cmp and v_cmp are means, cu_seqlens_k the keys' before compression."""

    config: NSAConfig
    softmax_scale: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    gates: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor


def _make_call(
    device: torch.device,
    *,
    q_lens: Sequence[int] = (70, 33),
    k_lens: Sequence[int] | None = None,
    num_kv_heads: int = 2,
    group_size: int = 2,
    head_dim: int = 16,
    value_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    config: NSAConfig = SMALL,
    softmax_scale: float = 0.25,
    q_scale: float = 1.0,
    seed: int = 0,
) -> Call:
    k_lens = q_lens if k_lens is None else k_lens
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    num_q, num_k, num_q_heads = sum(q_lens), sum(k_lens), num_kv_heads * group_size
    cu_k = cumulative(k_lens)
    q = q_scale * normal(num_q, num_q_heads, head_dim)
    k, v = normal(num_k, num_kv_heads, head_dim), normal(num_k, num_kv_heads, value_dim)
    k_cmp, v_cmp = (compress_reference(x, cu_k, config, pool_mean) for x in (k, v))
    tensors = (q, k, v, k_cmp, v_cmp, normal(num_q, num_q_heads, 3).sigmoid())
    return Call(
        config,
        softmax_scale,
        *(x.to(device=device, dtype=dtype) for x in tensors),
        cumulative(q_lens).to(device),
        cu_k.to(device),
    )


def cumulative(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> Answer:
    """Plain masked softmax attention in the dtype of q; visible: bool [num_q_tokens, num_k_tokens]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    sees_any = visible.any(-1, keepdim=True)
    scores = torch.einsum("thd,shd->hts", q, k) * softmax_scale
    # A row that sees nothing is made to see all, and then dropped: its gradients are zeros and not NaN.
    scores = scores.masked_fill(~visible & sees_any, -torch.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1) * sees_any, v)
    return out, scores.float().logsumexp(-1).masked_fill(~sees_any[:, 0], -torch.inf).T


class Branch:
    """Compressed ("compressed") or sliding-window ("window") attention of a call: ours, eager, the oracle."""

    def __init__(self, name: str, call: Call, backend: str = "auto") -> None:
        self.call = call
        self.backend = backend
        self.is_compressed = name == "compressed"
        self.operands = (call.q, call.k_cmp, call.v_cmp) if self.is_compressed else (call.q, call.k, call.v)

    def run(self, *operands: torch.Tensor, **options: Any) -> Answer:
        function = compressed_attention if self.is_compressed else sliding_window_attention
        call = self.call
        starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
        given = {"config": call.config, "softmax_scale": call.softmax_scale, "backend": self.backend}
        return function(*operands, **{**given, **starts, **options})

    def oracle(self, *operands: torch.Tensor) -> Answer:
        function = (
            compressed_attention_reference if self.is_compressed else sliding_window_attention_reference
        )
        call = self.call
        return function(*operands, call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)

    def eager(self, *operands: torch.Tensor) -> Answer:
        return eager_attention(*operands, self.visible(), self.call.softmax_scale)

    def visible(self) -> torch.Tensor:
        """bool [num_q_tokens, num_k_tokens]: each key, or window, by where it ends and which it is."""
        call, config = self.call, self.call.config
        masks = []
        starts = zip(call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist(), strict=True)
        for (q_start, k_start), (q_end, k_end) in itertools.pairwise(starts):
            position = torch.arange(q_end - q_start)[:, None] + (k_end - k_start) - (q_end - q_start)
            key = torch.arange(k_end - k_start)
            if self.is_compressed:
                last_key = key[config.kernel_size - 1 :: config.stride]
                masks.append(last_key <= position)
            else:
                masks.append((key <= position) & (key > position - config.window))
        return torch.block_diag(*masks).bool().to(call.q.device)

    def check(self) -> None:
        assert_close_to_oracle(self.run, self.eager, self.oracle, self.operands)


def assert_close_to_oracle(
    run: Callable[..., Answer],
    eager: Callable[..., Answer],
    oracle: Callable[..., Answer],
    operands: Sequence[torch.Tensor],
) -> None:
    """Answers, and gradients through both, err at most twice as eager attention does, and some roundings.

    In float32 on a GPU eight times: the kernels' products are three of tf32, which keep 21 of 24 bits.
    """
    (out, lse), (eager_out, eager_lse), (true_out, true_lse) = (
        function(*operands) for function in (run, eager, oracle)
    )
    dtype = operands[0].dtype
    sees_any = true_lse > -torch.inf
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(lse > -torch.inf, sees_any), "lse is -inf exactly where a query sees nothing"
    assert not out[~sees_any].any(), "a query that sees nothing gives zeros"
    assert_error(out, eager_out, true_out, dtype, "out")
    assert_error(lse[sees_any], eager_lse[sees_any], true_lse[sees_any], torch.float32, "lse")
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse) * sees_any
    grads, eager_grads, true_grads = (
        gradients(function, operands, grad_out, grad_lse, precision)
        for function, precision in ((run, dtype), (eager, dtype), (oracle, torch.float64))
    )
    for name, got, eager_grad, true in zip("qkv", grads, eager_grads, true_grads, strict=True):
        assert got.dtype == dtype
        # A score's gradient is the difference of two sums here, a sum of differences eagerly.
        assert_error(got, eager_grad, true, dtype, f"gradient of {name}", roundings=8)


def gradients(
    function: Callable[..., Answer],
    operands: Sequence[torch.Tensor],
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in operands]
    out, lse = function(*leaves)
    # Left out, an lse of -inf would make its gradient of zero a NaN.
    seen = lse > -torch.inf
    return torch.autograd.grad((out, lse[seen]), leaves, (grad_out.to(out), grad_lse.to(lse)[seen]))


def assert_error(
    got: torch.Tensor,
    eager: torch.Tensor,
    true: torch.Tensor,
    dtype: torch.dtype,
    what: str,
    roundings: int = 4,
) -> None:
    if not true.numel():
        return
    error, eager_error = ((x.double() - true).abs().amax().item() for x in (got, eager))
    factor = 8 if dtype == torch.float32 and got.is_cuda else 2
    bound = factor * eager_error + roundings * torch.finfo(dtype).eps * true.abs().amax().item()
    # Written so that a NaN error fails.
    assert error <= bound, f"{what}: error {error:.3g}, eager {eager_error:.3g}, bound {bound:.3g}"


@pytest.fixture(scope="session")
def make_call(device: torch.device) -> Callable[..., Call]:
    return partial(_make_call, device)

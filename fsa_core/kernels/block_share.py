"""What a block of keys adds to the gradient of q, and what gradients are made from."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fsa_core.kernels.primitives import LOG2_E


@dataclass(frozen=True, slots=True)
class Operands:
    """What gradients are made from; every tensor contiguous.

    q [total_q, q heads, head_dim], k [total_k, KV heads, head_dim], v [total_k, KV heads, value_dim], out,
    grad_out [total_q, q heads, value_dim], lse float32 [total_q, q heads], and grad_lse or None for zeros.
    delta float32 [total_q, heads], of query heads from ``first_delta_head`` on, is made from these.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    grad_out: torch.Tensor
    lse: torch.Tensor
    grad_lse: torch.Tensor | None
    delta: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    first_delta_head: int

    @property
    def starts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.grad_out, self.lse, self.delta


@triton.jit
def row_shift(lse):
    """What a row subtracts from its scores, in log2 units; infinity, for weights of 0, if it sees no key."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def add_share(grad_q, q, grad_out, k, v, shift, delta, visible, scale, CUT: tl.constexpr):
    """Adds a block's share, not scaled, to grad_q. CUT: ``visible`` hides some keys."""
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    weights = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
    if CUT:
        weights = tl.where(visible, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="tf32x3")
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="tf32x3")

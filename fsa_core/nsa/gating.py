"""The gated sum of the branches (equation 5), in torch operations or by kernels, differentiable in both."""

from typing import Any

import torch


def gated_sum_torch(branches: tuple[torch.Tensor, ...], gates: torch.Tensor) -> torch.Tensor:
    """Each branch [num_q_tokens, num_q_heads, value_dim] times its gate, added in float32, in their dtype."""
    total = gates[..., 0, None].float() * branches[0]
    for i, branch in enumerate(branches[1:], start=1):
        total = torch.addcmul(total, gates[..., i, None].float(), branch.float())
    return total.to(branches[0].dtype)


def gated_sum_triton(
    branches: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gates: torch.Tensor
) -> torch.Tensor:
    """The same of three branches with at least one query; it keeps nothing but its operands for gradients."""
    out: torch.Tensor = _GatedSum.apply(gates, *branches)  # type: ignore[no-untyped-call]
    return out


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, *branches: torch.Tensor) -> torch.Tensor:
        from fsa_core.kernels.gates import gated_sum_forward

        gates, first, second, third = (x.contiguous() for x in (gates, *branches))
        ctx.save_for_backward(gates, first, second, third)
        return gated_sum_forward((first, second, third), gates)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from fsa_core.kernels.gates import gated_sum_backward

        gates, *branches = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_with_graph(gates, branches, grad_out)
        *grad_branches, grad_gates = gated_sum_backward(tuple(branches), gates, grad_out.contiguous())
        return grad_gates, *grad_branches


def _gradients_with_graph(
    gates: torch.Tensor, branches: list[torch.Tensor], grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The same in torch operations, which have gradients of their own."""
    wide = grad_out.float()
    grad_gates = torch.stack([(wide * x.float()).sum(-1) for x in branches], -1).to(gates.dtype)
    weights = gates.float().unbind(-1)
    grads = [(wide * w[..., None]).to(x.dtype) for w, x in zip(weights, branches, strict=True)]
    return grad_gates, *grads

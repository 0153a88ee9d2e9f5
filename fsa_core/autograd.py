"""Attention as autograd sees it: one function of q, k and v, whose gradients its implementation computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fsa_core.autocast import in_own_precision
from fsa_core.problem import Problem

Answer = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Implementation:
    """Attention and its gradients, over contiguous tensors of a validated problem with at least one query.

    ``forward(problem, q, k, v, *rest)`` returns out and lse. ``backward(problem, q, k, v, *rest, out, lse,
    grad_out, grad_lse)`` returns the gradients of q, k and v. ``rest`` is what has no gradient:
    block_indices, unless attention is dense, cu_seqlens_q and cu_seqlens_k. ``knows_none``: grad_lse is None
    where nothing depends on lse, which saves a tensor of zeros.
    """

    forward: Callable[..., Answer]
    backward: Callable[..., Gradients]
    knows_none: bool = False


@in_own_precision
def differentiable_attention(
    implementation: Implementation,
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: torch.Tensor,
) -> Answer:
    """out in q's dtype and lse float32; tensors are kept only if a gradient may be asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        answer: Answer = _Attention.apply(implementation, problem, q, k, v, *rest)  # type: ignore[no-untyped-call]
        return answer
    return _answer(implementation, problem, q, k, v, *rest)


def _answer(
    implementation: Implementation, problem: Problem, q: torch.Tensor, *others: torch.Tensor
) -> Answer:
    if problem.num_q_tokens == 0:
        size = (0, problem.num_q_heads)
        return q.new_empty(*size, problem.value_dim), torch.empty(size, dtype=torch.float32, device=q.device)
    out, lse = implementation.forward(problem, q, *others)
    return _as(out, q.dtype), _as(lse, torch.float32)


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # What is of the dtype already is asked in a tenth of the time that torch takes to give it back.
    return x if x.dtype == dtype else x.to(dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: Implementation, problem: Problem, *tensors: torch.Tensor) -> Answer:
        # None for what nothing depends on; lse, most often.
        ctx.set_materialize_grads(False)
        out, lse = _answer(implementation, problem, *tensors)
        ctx.implementation, ctx.problem = implementation, problem
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        out, lse = tensors[-2:]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is None and not ctx.implementation.knows_none:
            grad_lse = torch.zeros_like(lse)
        # Autograd expands the gradient of a sum instead of writing it out.
        given = (*tensors, grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous())
        if torch.is_grad_enabled():
            grads = _Gradients.apply(ctx.implementation, ctx.problem, *given)  # type: ignore[no-untyped-call]
        else:
            grads = _gradients(ctx.implementation, ctx.problem, *given)
        needed = ctx.needs_input_grad[2:5]
        asked = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        # None for the implementation, for the problem and for what came after v, before out and lse.
        return None, None, *asked, *[None] * (len(tensors) - 5)


@in_own_precision
def _gradients(implementation: Implementation, problem: Problem, *tensors: Any) -> tuple[torch.Tensor, ...]:
    operands = tensors[:3]
    if problem.num_q_tokens == 0:
        return tuple(torch.zeros_like(x) for x in operands)
    grads = implementation.backward(problem, *tensors)
    return tuple([_as(grad, x.dtype) for grad, x in zip(grads, operands, strict=True)])


class _Gradients(torch.autograd.Function):
    """A function of its own where gradients may be asked for theirs, so that none is taken for zero.

    ``once_differentiable`` would notice those through grad_out and grad_lse, but none through q, k and v.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, problem: Problem, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        return _gradients(implementation, problem, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError("attention is differentiable once: it has no second derivatives")

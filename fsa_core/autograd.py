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
        if grad_lse is not None:
            grad_lse = without_keyless(grad_lse, lse).contiguous()
        elif not ctx.implementation.knows_none:
            grad_lse = torch.zeros_like(lse)
        # Autograd expands the gradient of a sum instead of writing it out.
        given = (*tensors, grad_out.contiguous(), grad_lse)
        grads = differentiated_once(_gradients, ctx.implementation, ctx.problem, *given)
        needed = ctx.needs_input_grad[2:5]
        asked = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        # None for the implementation, for the problem and for what came after v, before out and lse.
        return None, None, *asked, *[None] * (len(tensors) - 5)


@in_own_precision
def _gradients(implementation: Implementation, problem: Problem, *tensors: Any) -> Gradients:
    q, k, v = tensors[:3]
    if problem.num_q_tokens == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_q, grad_k, grad_v = implementation.backward(problem, *tensors)
    return _as(grad_q, q.dtype), _as(grad_k, k.dtype), _as(grad_v, v.dtype)


def without_keyless(grad_lse: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The gradient of lse without that of rows that see no key: their lse is -inf, whatever q, k and v are.

    What is made of -inf often has no gradient but NaN, and 0 times that would reach every key.
    """
    return grad_lse.masked_fill(lse == -torch.inf, 0.0)


def differentiated_once(function: Callable[..., Gradients], *args: Any) -> Gradients:
    """``function(*args)``, whose gradients, if they are asked for, raise RuntimeError.

    ``once_differentiable`` would notice those through the gradients that are given, but none through what
    was saved: they would be taken for zero.
    """
    if torch.is_grad_enabled():
        grads: Gradients = _Once.apply(function, *args)  # type: ignore[no-untyped-call]
        return grads
    return function(*args)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Gradients], *args: Any) -> Gradients:
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError("attention is differentiable once: it has no second derivatives")

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

    ``forward(problem, q, k, v, *rest)`` returns out, in q's dtype, and lse, float32. ``backward(problem, q,
    k, v, *rest, out, lse, grad_out, grad_lse)`` returns the gradients of q, k and v, in their dtypes;
    grad_lse is None where nothing depends on lse. ``rest`` is what has no gradient: block_indices, unless
    attention is dense, cu_seqlens_q and cu_seqlens_k. Neither is moved by autocast. ``keeping``, if there is
    one, is ``forward`` where gradients may be asked for: behind lse it may return one more tensor, which
    ``backward`` then takes behind grad_lse.
    """

    forward: Callable[..., Answer]
    backward: Callable[..., Gradients]
    keeping: Callable[..., tuple[torch.Tensor, ...]] | None = None


def in_torch(forward: Callable[..., Answer], backward: Callable[..., Gradients]) -> Implementation:
    """One of torch operations, which autocast would move; they answer in any dtype, and always get grad_lse.

    Kernels need none of this: their host would ask longer for it than it takes to look up what they launch.
    """

    @in_own_precision
    def forward_in_dtypes(problem: Problem, q: torch.Tensor, *others: torch.Tensor) -> Answer:
        out, lse = forward(problem, q, *others)
        return out.to(q.dtype), lse.to(torch.float32)

    @in_own_precision
    def backward_in_dtypes(problem: Problem, *tensors: Any) -> Gradients:
        *others, lse, grad_out, grad_lse = tensors
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        grad_q, grad_k, grad_v = backward(problem, *others, lse, grad_out, grad_lse)
        q, k, v = tensors[:3]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    return Implementation(forward_in_dtypes, backward_in_dtypes)


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
    out, lse = _answer(implementation.forward, problem, q, k, v, *rest)
    return out, lse


def _answer(
    forward: Callable[..., tuple[torch.Tensor, ...]],
    problem: Problem,
    q: torch.Tensor,
    *others: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    if problem.num_q_tokens == 0:
        size = (0, problem.num_q_heads)
        return q.new_empty(*size, problem.value_dim), torch.empty(size, dtype=torch.float32, device=q.device)
    return forward(problem, q, *others)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: Implementation, problem: Problem, *tensors: torch.Tensor) -> Answer:
        # None for what nothing depends on; lse, most often.
        ctx.set_materialize_grads(False)
        forward = implementation.keeping or implementation.forward
        out, lse, *kept = _answer(forward, problem, *tensors)
        ctx.implementation, ctx.problem, ctx.keeps = implementation, problem, bool(kept)
        ctx.save_for_backward(*tensors, out, lse, *kept)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors, ()
        if ctx.keeps:
            tensors, kept = tensors[:-1], tensors[-1:]
        out, lse = tensors[-2:]
        # Autograd expands the gradient of a sum instead of writing it out.
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = without_keyless(grad_lse, lse).contiguous()
        problem = ctx.problem
        function = ctx.implementation.backward if problem.num_q_tokens > 0 else _zeros
        grads = differentiated_once(function, problem, *tensors, grad_out, grad_lse, *kept)
        # None for the implementation, for the problem and for what came after v, before out and lse. Autograd
        # drops the gradients of those that ask for none.
        return None, None, *grads, *[None] * (len(tensors) - 5)


def _zeros(_problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Gradients:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


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

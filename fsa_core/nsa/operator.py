"""The operator from compressed keys on: its branches and, where kernels do it all, one call and one node.

What the stages launch is noted once and launched again as it was (fsa_core/kernels/replay.py), one call to
the host. To autograd it is one node: three branches share q and two share k and v, whose gradients are added
here.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fsa_core.api import selected_attention, selected_implementation
from fsa_core.dispatch import AUTO
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.stages import (
    add_branches,
    attend_and_choose,
    attend_last_keys,
    interval_gradients,
    kernel_sizes,
    versioned,
    window_sizes,
)
from fsa_core.nsa.validation import Call
from fsa_core.validation import validate_selected

if TYPE_CHECKING:
    from fsa_core.kernels.replay import Memory, Replayed

# Of q: 16K tokens of 16 heads of 128 numbers in 16 bits, which an H200 attends in 1.6 ms.
MOST_BYTES_AT_ONCE = 64 * 2**20

# q, k, v, k_cmp, v_cmp and gates.
Operands = tuple[torch.Tensor, ...]


class Branches(NamedTuple):
    """Outputs and log-sum-exps of compressed, selected and window attention, and the selected blocks."""

    compressed: torch.Tensor
    compressed_lse: torch.Tensor
    block_indices: torch.Tensor
    selected: torch.Tensor
    selected_lse: torch.Tensor
    window: torch.Tensor
    window_lse: torch.Tensor

    def add(self, gates: torch.Tensor, backend: str) -> torch.Tensor:
        return add_branches((self.compressed, self.selected, self.window), gates, backend)


def attend_branches(
    call: Call,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
) -> Branches:
    """One after the other, each differentiable."""
    compressed, block_indices = attend_and_choose(call, q, k_cmp, v_cmp, backend)
    selected = selected_attention(
        q,
        k,
        v,
        block_indices,
        block_size=call.config.block_size,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        softmax_scale=call.softmax_scale,
        backend=backend,
        # The ids are right by construction, and the rest is checked already.
        validate=False,
        workspace_limit_bytes=call.workspace_limit_bytes,
    )
    return Branches(*compressed, block_indices, *selected, *attend_last_keys(call, q, k, v, backend))


def attend_at_once(call: Call, backend: str, operands: Operands) -> torch.Tensor:
    """The gated sum of a call that ``launches_alone``, differentiable once."""
    operands = tuple([x.contiguous() for x in operands])
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        out: torch.Tensor = _Operator.apply(call, backend, *operands)  # type: ignore[no-untyped-call]
        return out
    return _launched(call, backend, operands, keep=False)[0]


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, backend: str, *operands: torch.Tensor) -> torch.Tensor:
        out, *branches = _launched(call, backend, operands, keep=True)
        ctx.call, ctx.backend = call, backend
        # Kernels read where sequences start anew: torch refuses gradients if that was overwritten meanwhile.
        starts = versioned((call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_cmp))
        ctx.save_for_backward(*operands, *branches, *starts)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, last = ctx.saved_tensors, 6 + len(Branches._fields)
        operands, branches = saved[:6], Branches(*saved[6:last])
        if torch.is_grad_enabled():
            return None, None, *_gradients_with_graph(ctx, operands, grad_out)
        return None, None, *_gradients(ctx.call, operands, branches, grad_out.contiguous())


def _launched(call: Call, backend: str, operands: Operands, *, keep: bool) -> tuple[torch.Tensor, ...]:
    """The gated sum and, to ``keep``, what the branches answered."""
    starts = (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_cmp)
    if operands[0].nbytes > MOST_BYTES_AT_ONCE:
        # As one call it would hold all that its stages take until the last has ended: not worth it where they
        # take longer than their launches.
        branches = attend_branches(call, backend, *operands[:5])
        out = branches.add(operands[5], backend)
        return (out, *branches) if keep else (out,)
    tensors = (*operands, *[x.contiguous() for x in starts])
    sizes = [(x.shape, x.dtype) for x in tensors]
    options = (call.config, call.softmax_scale, call.workspace_limit_bytes)
    return _replayed()(tensors, *options, backend, keep, *sizes)


@cache
def _replayed() -> "Replayed":
    # Triton is imported when a kernel is first needed.
    from fsa_core.kernels.replay import Replayed

    return Replayed(_note)


def _note(
    memory: "Memory",
    tensors: tuple[torch.Tensor, ...],
    config: NSAConfig,
    softmax_scale: float,
    workspace_limit_bytes: int,
    backend: str,
    keep: bool,
    *_sizes: object,
) -> None:
    q, k, v, k_cmp, v_cmp, gates, cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp = tensors
    starts = (cu_seqlens_q, cu_seqlens_k)
    # Where sequences start is on the device alone: another call of these sizes may have it elsewhere.
    call = Call(config, *starts, (), softmax_scale, workspace_limit_bytes, cu_seqlens_cmp)
    branches = attend_branches(call, backend, q, k, v, k_cmp, v_cmp)
    memory.give(branches.add(gates, backend))
    if keep:
        for x in branches:
            memory.give(x)


def _gradients(
    call: Call, operands: Operands, branches: Branches, grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Those of the operands, of kernels alone."""
    from fsa_core.kernels.gates import gated_sum_backward

    q, k, v, k_cmp, v_cmp, gates = operands
    b, limit = branches, call.workspace_limit_bytes
    outputs = (b.compressed, b.selected, b.window)
    # Those of the branches are taken out one by one, so that none is kept longer than it is needed.
    *given, grad_gates = gated_sum_backward(outputs, gates, grad_out)
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    problem = validate_selected(
        q, k, v, b.block_indices, block_size=call.config.block_size, softmax_scale=call.softmax_scale,
        causal=True, query_block_size=1, check_values=False, **starts,
    )  # fmt: skip
    selected = (b.block_indices, *starts.values(), b.selected, b.selected_lse)
    implementation = selected_implementation("triton", problem, q.device, AUTO, limit)
    grad_q, grad_k, grad_v = implementation.backward(problem, q, k, v, *selected, given.pop(1), None)
    share, *grads_cmp = interval_gradients(
        call, kernel_sizes(call, q, k_cmp, v_cmp), q, k_cmp, v_cmp, b.compressed, b.compressed_lse,
        given.pop(0), None,
    )  # fmt: skip
    grad_q += share
    del share
    shares = interval_gradients(
        call, window_sizes(call, q, k, v), q, k, v, b.window, b.window_lse, given.pop(), None
    )
    for total, share in zip((grad_q, grad_k, grad_v), shares, strict=True):
        total += share
    return grad_q, grad_k, grad_v, *grads_cmp, grad_gates


def _gradients_with_graph(ctx: Any, operands: Operands, grad_out: torch.Tensor) -> list[torch.Tensor | None]:
    """The same as a graph of their own (``create_graph=True``), branch by branch, attended once more."""
    # Names of their own: k_cmp may have been made of k, whose gradient here is not by way of it.
    named = [x.view_as(x) for x in operands]
    out = attend_branches(ctx.call, ctx.backend, *named[:5]).add(named[5], ctx.backend)
    needed = ctx.needs_input_grad[2:]
    asked = [x for x, need in zip(named, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(out, asked, grad_out, create_graph=True))
    return [next(grads) if need else None for need in needed]

"""What a call costs its host, taken apart: Python, and torch's engine of gradients."""

from typing import Any

import torch

from benchmarks.cases import Stage
from benchmarks.contenders import Answer, Run
from benchmarks.inputs import Inputs

PYTHON = "python"
AUTOGRAD = "autograd"


def controls(x: Inputs, stage: Stage, ours: Run) -> dict[str, Run]:
    """Calls to time beside ``ours``, which prepared them: what they leave out is what the difference costs.

    "python" is the same call with launches, of kernels or graphs of them, that do nothing: Python, torch's
    allocations and autograd are left. "autograd", of gradients, is autograd's way to a function that computes
    nothing.
    """
    found = {PYTHON: _launching_nothing(ours)}
    if stage == "backward":
        leaves = tuple(t.detach().requires_grad_() for t in (x.q, x.k, x.v))
        out: torch.Tensor = _Nothing.apply(x.grad_out, *leaves)  # type: ignore[no-untyped-call]
        found[AUTOGRAD] = lambda: torch.autograd.grad(out, leaves, x.grad_out, retain_graph=True)
    return found


def _launching_nothing(run: Run) -> Run:
    from triton.runtime import driver

    from fsa_core.kernels.call_graphs import CallGraphs

    launcher = driver.active.launcher_cls

    def timed() -> Answer:
        launch, replay, note = launcher.__call__, torch.cuda.CUDAGraph.replay, CallGraphs.note
        # Noted, a graph of nothing would be recorded, and launched where the call is meant.
        launcher.__call__ = torch.cuda.CUDAGraph.replay = CallGraphs.note = _nothing
        try:
            return run()
        finally:
            launcher.__call__, torch.cuda.CUDAGraph.replay, CallGraphs.note = launch, replay, note

    return timed


def _nothing(*_: object) -> None:
    pass


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*leaves)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.saved_tensors

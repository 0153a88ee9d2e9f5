"""The forward pass of a call whose gradients may be asked for."""

from functools import lru_cache

import torch

from fsa_core.kernels import hopper
from fsa_core.kernels.backward import planned
from fsa_core.kernels.forward import forward_keeping, plan_on
from fsa_core.kernels.kept import kept_bytes
from fsa_core.problem import Problem
from fsa_core.tiles import Tuning


def selected_attention_keeping(
    problem: Problem,
    *tensors: torch.Tensor,
    path: str,
    backward_path: str,
    tuning: Tuning | None,
    workspace_limit_bytes: int,
) -> tuple[torch.Tensor, ...]:
    """``selected_attention_forward`` and, behind its answer, what it kept for gradients on ``backward_path``.

    Nothing is kept where these would find other lists, or where it is too much: see ``kept_bytes``.
    """
    device = tensors[0].device
    paths = (path, backward_path)
    num_bytes = _kept_bytes(problem, device, hopper.runs_on(device), workspace_limit_bytes, paths, tuning)
    return forward_keeping(tensors, problem, path, tuning, workspace_limit_bytes, num_bytes)


@lru_cache(maxsize=1024)
def _kept_bytes(
    problem: Problem,
    device: torch.device,
    on_hopper: bool,
    workspace_limit_bytes: int,
    paths: tuple[str, str],
    tuning: Tuning | None,
) -> int:
    forward = plan_on(device, problem, workspace_limit_bytes, paths[0], tuning)
    backward, _ = planned(problem, device, on_hopper, workspace_limit_bytes, paths[1], tuning)
    return kept_bytes(problem, device, forward, backward, workspace_limit_bytes)

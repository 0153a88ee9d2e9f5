"""Which path a shape takes through the kernels, and why: what ``fsa info --shape`` prints."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from service.commands.failures import CommandFailed
from service.commands.output import format_bytes, print_table
from service.commands.shapes import CallShape

if TYPE_CHECKING:
    from fsa_core.plan import ForwardPlan


def show_path(
    shape: CallShape, lengths: Sequence[int], device_name: str | None, path: str, as_json: bool
) -> None:
    """Raises CommandFailed. ``device_name`` None: that of the first GPU here."""
    from fsa_core.dispatch import choose
    from fsa_core.plan import plan_forward

    problems = [shape.problem(length) for length in lengths]
    device_name = device_name or _first_gpu()
    try:
        choice = choose(problems[0], device_name, path)
        plans = {
            problem.num_q_tokens: plan_forward(problem, path=choice.path, tuning=choice.tuning)
            for problem in problems
        }
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    described = {
        "device": device_name,
        "path": choice.path,
        "backward_path": choice.backward_path,
        "reason": choice.reason,
    }
    tiles = _tiles(plans[lengths[0]])
    workspace = {str(length): plan.workspace_bytes for length, plan in plans.items()}
    if as_json:
        print(json.dumps({**described, "tiles": tiles, "workspace_bytes": workspace}, indent=2))
        return
    sizes = [
        (f"{kind} tiles", ", ".join(f"{size} {name}" for name, size in x.items()))
        for kind, x in tiles.items()
    ]
    memory = [(f"workspace of {length} tokens", format_bytes(size)) for length, size in workspace.items()]
    print_table([*described.items(), *sizes, *memory])


def _first_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise CommandFailed("no GPU here, and paths are of GPUs; name one with --device 'NVIDIA H200'")
    return torch.cuda.get_device_name()


def _tiles(plan: "ForwardPlan") -> dict[str, dict[str, Any]]:
    """The kinds of tiles that the plan has."""
    tiles = {}
    if plan.has_partials:
        tiles["partial"] = asdict(plan.tile)
    if plan.query_tile is not None:
        tiles["query"] = asdict(plan.query_tile)
    return tiles

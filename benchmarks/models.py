"""Real models' layers, attention swapped: ``python -m benchmarks.models --peers DIR --json FILE``.

A stack of layers with random weights takes one sequence of random embeddings. Training is forward, backward
and a fused AdamW step; prefill is forward in inference mode. All attention runs in the same process, on the
same weights and inputs, in turns: the learning rate is 0, which saves no work and keeps the weights.

Before it is timed, an attention's answer for the first layer is checked against float64
(``model_cores.worst_error``). What fails, is wrong or runs out of memory is written down with the reason;
if it is ours, the exit code is 1.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import extra_bytes, take_turns, timer_for
from benchmarks.model_cores import cores_of, worst_error
from benchmarks.model_layer import MODELS, Core, ModelShape, Stack, rotation_of
from benchmarks.models_results import PHASES, ModelResults, ModelRow, Phase
from benchmarks.progress import progress_bar
from benchmarks.results_file import Measured, machine_of
from fsa_core.nsa.config import NSAConfig

LENGTHS = (32768, 65536)
# A row of a branch in bfloat16, gated and added, as in benchmarks/contenders.py.
TOLERANCE = 3e-2
TINY = ModelShape("tiny", 2, 64, 128, 4, 2, rope_theta=1e4, head_dim=16, qkv_bias=True, qk_norm=True)
TINY_CONFIG = NSAConfig(kernel_size=8, stride=4, block_size=16, top_k=4, window=32)
TINY_TOKENS = 192


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("benchmarks: torch sees no GPU; --tiny runs on a CPU")
    shapes = (TINY,) if options.tiny else MODELS
    lengths = (TINY_TOKENS,) if options.tiny else options.lengths
    config = TINY_CONFIG if options.tiny else NSAConfig()
    cores = cores_of(config, device, options.peers)
    words = sys.argv[1:] if arguments is None else list(arguments)
    results = ModelResults(machine_of(device), shlex.join(["python", "-m", "benchmarks.models", *words]))
    with progress_bar() as progress:
        task = progress.add_task("layers", total=len(shapes) * len(lengths) * len(PHASES))
        for shape in shapes:
            if options.only not in shape.name:
                progress.advance(task, len(lengths) * len(PHASES))
                continue
            for row in measure_model(shape, lengths, options.layers, cores, config, device, options.seconds):
                results.rows.append(row)
                print(_line(row), flush=True)
                results.write(options.json)
                progress.update(task, advance=1, description=shape.name)
    return int(any(row.contenders["ours"].refused for row in results.rows))


def measure_model(
    shape: ModelShape,
    lengths: Sequence[int],
    num_layers: int,
    cores: dict[str, Core],
    config: NSAConfig,
    device: torch.device,
    seconds_each: float,
) -> Iterator[ModelRow]:
    """Rows of every length and phase; ``seconds_each`` is the least time for each attention in one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stack = Stack(shape, num_layers, device, dtype)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.0, fused=True)
    for num_tokens in lengths:
        generator = torch.Generator(device).manual_seed(num_tokens)
        x, grad_out = (
            torch.randn(num_tokens, shape.hidden_dim, device=device, dtype=dtype, generator=generator)
            for _ in range(2)
        )
        rotation = rotation_of(shape, num_tokens, x)
        for phase in PHASES:
            steps = {
                name: _step(phase, stack, optimizer, x, grad_out, rotation, cores[name]) for name in cores
            }
            measured, runs = {}, {}
            for name, step in steps.items():
                measured[name] = _admitted(step, stack, x, rotation, cores[name], config, name)
                if measured[name].refused is None:
                    runs[name] = step
            for name, times in take_turns(runs, timer_for(device), seconds_each).items():
                measured[name] = Measured(
                    median_seconds=times.median_seconds,
                    p20_seconds=times.p20_seconds,
                    p80_seconds=times.p80_seconds,
                    runs=times.runs,
                    extra_bytes=measured[name].extra_bytes,
                    worst_error=measured[name].worst_error,
                )
            yield ModelRow(shape.name, num_tokens, num_layers, phase, measured)


def _step(
    phase: Phase,
    stack: Stack,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    grad_out: torch.Tensor,
    rotation: torch.Tensor,
    core: Core,
) -> Callable[[], None]:
    def prefill() -> None:
        with torch.inference_mode():
            stack(x, rotation, core)

    def train() -> None:
        # As in the middle of a model: the first layer's input has a gradient, too.
        stack(x.detach().requires_grad_(), rotation, core).backward(grad_out)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return prefill if phase == "prefill" else train


def _admitted(
    step: Callable[[], None],
    stack: Stack,
    x: torch.Tensor,
    rotation: torch.Tensor,
    core: Core,
    config: NSAConfig,
    name: str,
) -> Measured:
    """How the attention did at the gate, and the memory of a step; ``refused`` if it is not to be timed."""
    try:
        with torch.inference_mode():
            operands = stack.layers[0].operands(x, rotation)
            error = worst_error(core(*operands), operands, config, dense=name.startswith("dense"))
        del operands
        if not error <= TOLERANCE:
            return Measured(worst_error=error, refused=f"wrong by {error:.1e}")
        # The first step compiles, and makes the optimizer's moments.
        step()
        memory = extra_bytes(step) if x.is_cuda else None
    except Exception as failure:
        # One that cannot run must not keep the others from being measured.
        stack.zero_grad(set_to_none=True)
        return Measured(refused=f"failed: {type(failure).__name__}: {failure}"[:200])
    return Measured(extra_bytes=memory, worst_error=error)


def _line(row: ModelRow) -> str:
    columns = []
    for name, measured in row.contenders.items():
        seconds = row.layer_seconds(name)
        said = (measured.refused or "")[:60] if seconds is None else f"{seconds * 1e3:.4g} ms"
        columns.append(f"{name} {said}")
    return f"{row.model} {row.num_tokens} {row.phase}, a layer:  " + "   ".join(columns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="written after every row")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="peers' checkouts, see benchmarks/peers.py")
    parser.add_argument("--layers", type=int, default=2, help="of a stack (2)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (32768 65536)")
    parser.add_argument("--only", default="", metavar="PART", help="models whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.15, help="to measure each attention of a row for")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU: that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

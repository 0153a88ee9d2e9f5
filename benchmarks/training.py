"""Train a small model with Native Sparse Attention from scratch, and the same one with dense attention.

``python -m benchmarks.training --json FILE`` trains both on the same batches of the standard library's
sources, as bytes, from the same seed, and exits with 1 if the sparse one's final loss on files that neither
has seen is more than 2% above the dense one's. ``benchmarks.training_report`` makes the table and the plot.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks.corpus import Corpus, standard_library, windows
from benchmarks.progress import progress_bar
from benchmarks.results_file import machine_of
from benchmarks.training_model import ATTENTION, ByteModel, ModelConfig
from benchmarks.training_report import print_table
from benchmarks.training_results import Run, TrainingResults
from fsa_core.nsa.module import COMPRESSIONS

MOST_ABOVE_DENSE = 1.02
VALIDATION_SEQUENCES = 32
LOSSES_A_POINT = 10


@dataclass(frozen=True, slots=True)
class Options:
    """``sequences`` of ``length`` bytes a step; the loss is validated every ``validate_every`` steps."""

    steps: int = 1000
    sequences: int = 8
    length: int = 4096
    validate_every: int = 100
    learning_rate: float = 1e-3
    warm_up_steps: int = 100
    seed: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(**{name: getattr(given, name) for name in ("steps", "sequences", "length", "seed")})
    config = ModelConfig(compression=given.compression)
    corpus = standard_library()
    words = sys.argv[1:] if arguments is None else list(arguments)
    results = TrainingResults(
        machine=machine_of(device),
        command=shlex.join(["python", "-m", "benchmarks.training", *words]),
        corpus={
            "source": "the standard library of this Python",
            "files": corpus.num_files,
            "training_bytes": corpus.training.numel(),
            "held_out_bytes": corpus.held_out.numel(),
            "sha256": corpus.sha256,
        },
        model=asdict(config),
        options=asdict(options),
    )
    print("  ".join(f"{name} {value}" for name, value in results.machine.items()))
    train_both(results, corpus, config, options, device, given.json)
    print_table(results)
    return 0 if results.final_ratio <= MOST_ABOVE_DENSE else 1


def train_both(
    results: TrainingResults,
    corpus: Corpus,
    config: ModelConfig,
    options: Options,
    device: torch.device,
    path: Path | None = None,
) -> None:
    """Fills ``results.runs``, and writes them as they grow."""

    def write() -> None:
        if path is not None:
            results.write(path)

    with progress_bar() as progress:
        for attention in ATTENTION:
            torch.manual_seed(options.seed)
            model = ByteModel(attention, config).to(device)
            run = Run(parameters=sum(p.numel() for p in model.parameters()))
            results.runs[attention] = run
            train(model, run, corpus, options, progress, attention, write)


def train(
    model: ByteModel,
    run: Run,
    corpus: Corpus,
    options: Options,
    progress: Progress,
    name: str,
    write: Callable[[], None],
) -> None:
    """The same batches for every model: they are drawn from the seed alone."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    task = progress.add_task(name, total=options.steps)
    losses: list[torch.Tensor] = []
    begun = time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, options)
        starts = torch.randint(
            corpus.training.numel() - options.length, (options.sequences,), generator=generator
        )
        batch = windows(corpus.training, starts, options.length).to(device, non_blocking=True)
        with _autocast(device):
            loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % LOSSES_A_POINT == 0 or step == options.steps:
            # Waits for the device, and so seconds are what was done in them.
            run.training.append((step, torch.stack(losses).mean().item()))
            losses.clear()
        if step % options.validate_every == 0 or step == options.steps:
            run.seconds += time.perf_counter() - begun
            run.validation.append((step, validation_loss(model, corpus, options)))
            print(f"{name:<8} step {step:>5}  held-out loss {run.final_loss:.4f}", flush=True)
            write()
            begun = time.perf_counter()
        progress.advance(task)
    if device.type == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()
    write()


@torch.no_grad()
def validation_loss(model: ByteModel, corpus: Corpus, options: Options) -> float:
    """Over equally spaced sequences of the held-out files, always the same."""
    device = model.embedding.weight.device
    starts = torch.linspace(0, corpus.held_out.numel() - options.length - 1, VALIDATION_SEQUENCES).long()
    losses = []
    for some in starts.split(options.sequences):
        with _autocast(device):
            losses.append(model.loss(windows(corpus.held_out, some, options.length).to(device)) * len(some))
    return torch.stack(losses).sum().item() / VALIDATION_SEQUENCES


def _schedule(step: int, options: Options) -> float:
    """Linear to 1, and then half a cosine down to a tenth."""
    if step <= options.warm_up_steps:
        return step / options.warm_up_steps
    done = (step - options.warm_up_steps) / max(options.steps - options.warm_up_steps, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU; parameters and their updates stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    parser.add_argument("--compression", choices=COMPRESSIONS, default=ModelConfig().compression)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--sequences", type=int, default=default.sequences, help="of a step")
    parser.add_argument("--length", type=int, default=default.length, help="of a sequence, in bytes")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, as they come")
    return parser


if __name__ == "__main__":
    sys.exit(main())

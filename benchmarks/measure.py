"""Times and memory of calls, and what the machine could do at best."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import torch

from fsa_core.timing import Timer, host_timer, timer_for

# Contenders take turns so often, so that a clock that drifts drifts for all of them; in another order each
# time, so that nobody always follows the one that heats the device most.
ROUNDS = 4
MOST_RUNS_A_TURN = 50
# A call slower than this is timed once: its noise is small beside what turns would cost.
SLOW_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Times:
    median_seconds: float
    p20_seconds: float
    p80_seconds: float
    runs: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best this machine did in the same run: one large matrix product, one large copy."""

    dtype: str
    flops_per_second: float
    bytes_per_second: float


def take_turns(
    runs: Mapping[str, Callable[[], object]], timer: Timer, seconds_each: float
) -> dict[str, Times]:
    """Times of calls that have run before, about ``seconds_each`` of each, at least ``ROUNDS`` runs.

    A call that takes more than ``SLOW_SECONDS`` has one run, as its ``Times`` tell.
    """
    turns = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        estimate = timer(run, 1)[0]
        if estimate > SLOW_SECONDS:
            seconds[name].append(estimate)
        else:
            turns[name] = min(max(int(seconds_each / ROUNDS / estimate), 1), MOST_RUNS_A_TURN)
    order, draw = list(turns), Random(0)
    for _ in range(ROUNDS):
        draw.shuffle(order)
        for name in order:
            seconds[name] += timer(runs[name], turns[name])
    return {name: _times(values) for name, values in seconds.items()}


def enqueue_timer(run: Callable[[], object], count: int) -> list[float]:
    """What a call costs the host before it returns; the device is idle when the calls begin."""
    torch.cuda.synchronize()
    seconds = host_timer(run, count)
    torch.cuda.synchronize()
    return seconds


def extra_bytes(run: Callable[[], object]) -> int:
    """Device memory that a call takes at its peak, beyond what was there before and its answer."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = run()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del answer
    return torch.cuda.max_memory_allocated() - before - kept


def measure_ceilings(device: torch.device, seconds: float) -> Ceilings:
    on_gpu = device.type == "cuda"
    size, dtype, copied = (8192, torch.bfloat16, 1 << 30) if on_gpu else (1024, torch.float32, 1 << 27)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for run in runs.values():
        run()
    times = take_turns(runs, timer_for(device), seconds)
    return Ceilings(
        dtype=str(dtype).removeprefix("torch."),
        flops_per_second=2 * size**3 / times["product"].median_seconds,
        bytes_per_second=2 * copied / times["copy"].median_seconds,
    )


def _times(seconds: list[float]) -> Times:
    ordered = sorted(seconds)
    fifth = len(ordered) // 5
    return Times(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], len(ordered))

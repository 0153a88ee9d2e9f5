"""How long calls take, on the device that does the work."""

import time
from collections.abc import Callable

import torch

# Larger than any L2 cache: what a run left there must not make the next one faster.
FLUSH_BYTES = 1 << 28

# Seconds of each of ``count`` calls of ``run``.
Timer = Callable[[Callable[[], object], int], list[float]]


def timer_for(device: torch.device) -> Timer:
    return cuda_timer if device.type == "cuda" else host_timer


def host_timer(run: Callable[[], object], count: int) -> list[float]:
    """What each call takes until it returns."""
    return [_host_seconds(run) for _ in range(count)]


def cuda_timer(run: Callable[[], object], count: int) -> list[float]:
    """Between events around each call, the L2 cache flushed before; nothing waits for the host in between."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

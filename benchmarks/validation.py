"""What checking block_indices costs beside copying them: ``python -m benchmarks.validation``."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fsa_core.drawn_indices import causal_block_indices
from fsa_core.index_checks import IndexRows, ids_are_valid

BLOCK_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    # One head at a time: the scores that the choice is drawn from are large.
    ascending = torch.cat(
        [
            causal_block_indices(options.tokens, 1, options.slots, BLOCK_SIZE, "random", generator)
            for _ in range(options.heads)
        ]
    )
    shuffled = ascending.gather(-1, torch.rand(ascending.shape, generator=generator).argsort(-1)).contiguous()
    received = torch.empty_like(ascending)
    runs = {
        "copy": lambda: received.copy_(ascending),
        "check, ascending rows": lambda: _check(ascending),
        "check, shuffled rows": lambda: _check(shuffled),
    }
    print(f"{options.heads} x {options.tokens} x {options.slots} indices, {ascending.nbytes / 2**20:.0f} MiB")
    results = {name: _fastest_ms(run, options.repeats) for name, run in runs.items()}
    for name, milliseconds in results.items():
        print(f"{name:<24}{milliseconds:>8.1f} ms{ascending.nbytes / milliseconds / 1e6:>8.1f} GB/s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _check(ids: torch.Tensor) -> None:
    cu_seqlens = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    rows = IndexRows.of(
        cu_seqlens, cu_seqlens, ids.shape[1], block_size=BLOCK_SIZE, query_block_size=1, causal=True
    )
    if not ids_are_valid(ids, rows, torch.tensor(True)):
        raise SystemExit("valid indices were refused")


def _fastest_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3


if __name__ == "__main__":
    main()

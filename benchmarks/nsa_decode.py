"""What a decode step of the layer of Native Sparse Attention costs, by the number of sequences.

Run: ``python -m benchmarks.nsa_decode --json FILE.json``. Every sequence is filled by a prompt of random
tokens, each a token shorter than the last, so that windows are completed in all steps, as in a server; then
each gets a token a step. Steps follow one another without a wait, and the clock stops when the device is
done. It uses nothing but the layer and its cache, and so times any commit that has them. That decoding gives
what one pass gives is tested (tests/fsa_core/nsa/test_module.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType

from benchmarks.results_file import machine_of, write_json
from fsa_core.nsa.cache import NSACache
from fsa_core.nsa.module import COMPRESSIONS, NativeSparseAttention

# More than a window has tokens: room for them is made, and every kernel compiled, before the clock runs.
WARM_UP_STEPS = 64
STEPS, ROUNDS = 64, 5


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of rounds; ``host_seconds`` is when the last step's call returns. Launches are a step's."""

    num_sequences: int
    step_seconds: float
    host_seconds: float
    launches: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--keys", type=int, default=32768, help="of the longest sequence")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--compression", choices=COMPRESSIONS, default="mlp")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    layer = _layer(options)
    print(f"{'sequences':>9} {'step':>11} {'host':>11} {'launches':>9}")
    rows = []
    for num_sequences in options.batches:
        rows.append(row := measure(layer, num_sequences, options.keys))
        launches = "" if row.launches is None else f"{row.launches:.1f}"
        times = f"{row.step_seconds * 1e3:8.3f} ms {row.host_seconds * 1e3:8.3f} ms"
        print(f"{num_sequences:>9} {times} {launches:>9}", flush=True)
    if options.json:
        names = ("keys", "kv_heads", "group", "head_dim", "compression")
        sizes = {name: vars(options)[name] for name in names}
        machine = machine_of(options.device)
        write_json(options.json, {"machine": machine, **sizes, "rows": [asdict(row) for row in rows]})


@torch.no_grad()
def measure(layer: NativeSparseAttention, num_sequences: int, num_keys: int) -> Row:
    device = layer.q_proj.weight.device
    cache, x = NSACache(num_sequences), _tokens(layer, num_keys)
    for sequence in range(num_sequences):
        count = num_keys - sequence
        starts = torch.tensor([0] * (sequence + 1) + [count] * (num_sequences - sequence))
        layer(x[:count], starts.int(), cache)
    new = _tokens(layer, num_sequences)
    # On the CPU: nothing waits for the device to read it.
    starts = torch.arange(num_sequences + 1, dtype=torch.int32)

    def step() -> None:
        layer(new, starts, cache)

    for _ in range(WARM_UP_STEPS):
        step()
    rounds = [_seconds(step, device) for _ in range(ROUNDS)]
    step_seconds, host_seconds = (statistics.median(x) for x in zip(*rounds, strict=True))
    return Row(num_sequences, step_seconds, host_seconds, _launches(step, device))


def _layer(options: argparse.Namespace) -> NativeSparseAttention:
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    num_q_heads = options.kv_heads * options.group
    layer = NativeSparseAttention(
        num_q_heads * options.head_dim,
        num_q_heads,
        options.kv_heads,
        head_dim=options.head_dim,
        compression=options.compression,
    )
    return layer.to(options.device, dtype)


def _tokens(layer: NativeSparseAttention, count: int) -> torch.Tensor:
    weight = layer.q_proj.weight
    return torch.randn(count, weight.shape[1], device=weight.device, dtype=weight.dtype)


def _seconds(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Of a step among many: until the device is done, and until the calls return."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    returned = time.perf_counter()
    _wait_for(device)
    return (time.perf_counter() - start) / STEPS, (returned - start) / STEPS


def _launches(step: Callable[[], None], device: torch.device) -> float | None:
    """Kernels and copies of a step, on average; None without a GPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step()
        _wait_for(device)
    return sum(event.device_type == DeviceType.CUDA for event in profile.events()) / STEPS


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

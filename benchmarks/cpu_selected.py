"""The CPU backend beside torch's dense attention: ``python -m benchmarks.cpu_selected``.

What is compared is the time of one (query head, attended key) pair, because that is what selection saves on.
Runs of the two alternate and the fastest of each counts. A wrong answer gets no time.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cases import Case
from benchmarks.gate import sampled_truth, worst_error
from benchmarks.inputs import Inputs, attended_pairs, make_inputs
from fsa_core.api import selected_attention

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, BLOCK_SIZE, NUM_SLOTS = 3, 3, 64, 64, 16
DTYPES = ("float32", "bfloat16")
WORST_RELATIVE_ERROR = 1e-2
COLUMNS = (
    "tokens",
    "indices",
    "dtype",
    "selected ms",
    "dense ms",
    "selected ns/key",
    "dense ns/key",
    "ratio",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(_line(COLUMNS))
    rows = []
    for tokens in options.tokens:
        for kind in ("random", "real"):
            for dtype in options.dtypes:
                rows.append(_measure(tokens, kind, dtype, options.repeats))
                print(
                    _line([f"{x:.2f}" if isinstance(x, float) else x for x in rows[-1].values()]), flush=True
                )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _measure(num_tokens: int, kind: str, dtype: str, repeats: int) -> dict[str, object]:
    x = _inputs(num_tokens, kind, dtype)

    def selected() -> torch.Tensor:
        return selected_attention(x.q, x.k, x.v, x.block_indices, block_size=BLOCK_SIZE, validate=False)[0]

    q, k, v = (t.transpose(0, 1)[None].contiguous() for t in (x.q, x.k, x.v))

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    error = worst_error((selected(),), sampled_truth(x, "forward"))
    if not error < WORST_RELATIVE_ERROR:
        raise SystemExit(f"{num_tokens} tokens, {kind}, {dtype}: wrong by {error:.1e}")
    selected_seconds, dense_seconds = _fastest([selected, dense], repeats)
    selected_ns = selected_seconds * 1e9 / attended_pairs(x)
    dense_ns = dense_seconds * 1e9 / (q.shape[1] * num_tokens * (num_tokens + 1) // 2)
    values = (num_tokens, kind, dtype, selected_seconds * 1e3, dense_seconds * 1e3, selected_ns, dense_ns)
    return dict(zip(COLUMNS, (*values, selected_ns / dense_ns), strict=True))


def _inputs(num_tokens: int, kind: str, dtype: str) -> Inputs:
    shape = {
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "value_dim": HEAD_DIM,
        "num_slots": NUM_SLOTS,
    }
    case = Case(num_tokens, GROUP_SIZE, kind, block_size=BLOCK_SIZE, dtype=dtype, **shape)
    return make_inputs(case, torch.device("cpu"))


def _fastest(runs: list[Callable[[], torch.Tensor]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, its_times in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            its_times.append(time.perf_counter() - start)
    return [min(its_times[1:]) for its_times in times]


def _line(columns: object) -> str:
    return "".join(f"{column!s:>17}" for column in columns)


if __name__ == "__main__":
    main()

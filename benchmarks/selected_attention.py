"""Selected attention on a GPU beside its peers: ``python -m benchmarks.selected_attention``.

Every implementation runs on the same inputs in the same process. A wrong answer gets no time.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from rich.progress import Progress
from triton.testing import do_bench

from benchmarks.cases import Case, Inputs, make_inputs, sampled_truth, selected_attention_cases
from benchmarks.peers import Run, dense_cudnn, sparse_peers
from fsa_core.api import selected_attention

# bfloat16 answers of every implementation lie within 2e-3 of the truth; a wrong one is off by its own size.
WORST_RELATIVE_ERROR = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--kinds", nargs="+", default=["random", "real"], choices=["random", "real"])
    parser.add_argument("--peers", type=Path, help="folder of peers' checkouts, see benchmarks/peers.py")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("selected_attention: needs a CUDA GPU; on a CPU see benchmarks/cpu_selected.py")
    implementations: dict[str, Callable[[Inputs], Run]] = {"ours": _ours}
    if options.peers:
        implementations |= sparse_peers(options.peers)
    implementations["dense cuDNN"] = dense_cudnn
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    cases = selected_attention_cases(options.tokens, options.group_sizes, options.kinds)
    rows = []
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=len(cases))
        print(_line("tokens", "g", "indices", *(f"{name} ms" for name in implementations), "extra MiB"))
        for case in cases:
            rows.append(_measure(case, implementations))
            print(_format(rows[-1], list(implementations)), flush=True)
            progress.advance(task)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _ours(x: Inputs) -> Run:
    options = {"block_size": x.block_size, "softmax_scale": x.softmax_scale, "validate": False}
    return lambda: selected_attention(x.q, x.k, x.v, x.block_indices, **options)[0]


def _measure(case: Case, implementations: dict[str, Callable[[Inputs], Run]]) -> dict[str, object]:
    x = make_inputs(case, torch.device("cuda"))
    n = case.num_tokens
    tokens = [0, 1, case.block_size - 1, case.block_size, n // 3, n // 2, n - 1]
    truth = sampled_truth(x, tokens)
    row: dict[str, object] = asdict(case)
    for name, make in implementations.items():
        try:
            run = make(x)
            out = run()
            if name != "dense cuDNN":
                error = ((out[tokens].double() - truth).norm() / truth.norm()).item()
                if not error < WORST_RELATIVE_ERROR:
                    row[name] = f"wrong ({error:.1e})"
                    continue
            if name == "ours":
                row["extra_mib"] = _peak_mib(run) - out.numel() * out.element_size() / 2**20
            row[name] = do_bench(run, warmup=20, rep=100, return_mode="median")
        except Exception as failure:
            # A peer that cannot run a case must not keep the others from being measured.
            row[name] = f"failed ({type(failure).__name__})"
    return row


def _peak_mib(run: Run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _format(row: dict[str, object], names: list[str]) -> str:
    times = [f"{t:.3f}" if isinstance(t := row.get(name), float) else str(t) for name in names]
    return _line(
        row["num_tokens"], row["group_size"], row["kind"], *times, f"{row.get('extra_mib', 0.0):.0f}"
    )


def _line(tokens: object, group: object, kind: object, *columns: object) -> str:
    return f"{tokens:>7} {group:>3} {kind:<8}" + "".join(f"{column:>18}" for column in columns)


if __name__ == "__main__":
    main()

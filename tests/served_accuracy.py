"""A table of served answers against the oracle: ``python -m tests.served_accuracy --devices cpu``.

Starts a real server, asks it for every shape, and compares with float64 attention. The yardstick is the
error of eager attention in the request's own precision. Exits 1 when an answer is further off than the tests
allow.

TRITON_INTERPRET=1 with ``--backend triton`` serves from the kernels in Triton's interpreter, which is slow
and wrong for bfloat16: float16 and short sequences are asked for then.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from service.client import AttentionClient, BlockIndices
from tests.fsa_core.conftest import Case, assert_close_to_oracle, eager_attention
from tests.fsa_core.conftest import _make_case as make_case
from tests.serving import running_server

GROUP_SIZES = (1, 2, 3, 4, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256)
COLUMNS = ("SHAPE", "DTYPE", "ERROR", "EAGER'S", "RATIO", "LSE ERROR", "")


@dataclass(frozen=True)
class Row:
    """Largest absolute errors of one answer against float64; ``eager_error`` is that of plain attention."""

    shape: str
    dtype: str
    error: float
    eager_error: float
    lse_error: float
    ok: bool


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "triton"))
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    interpreted = options.backend == "triton" and options.devices == "cpu"
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--backend triton on the CPU needs TRITON_INTERPRET=1 in the environment")
    dtypes = (torch.float16,) if interpreted else (torch.float16, torch.bfloat16)
    length = 40 if interpreted else 300
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"devices": options.devices, "backend": options.backend}
        with running_server(Path(folder) / "log", **settings) as server:
            server.wait_for_health()
            with AttentionClient(server.target, timeout_seconds=300) as client:
                info = client.server_info()
                print(f"fsa {info.version} on {info.devices[0].name}, kernels {', '.join(info.kernels)}")
                print(_line(COLUMNS))
                for shape, arguments in _shapes(length):
                    for dtype in dtypes:
                        case = make_case(torch.device(options.devices), dtype=dtype, **arguments)
                        rows.append(_measure(client, shape, case))
                        print(_format(rows[-1]), flush=True)
    wrong = sum(not row.ok for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} answers are as close to the truth as they must be")
    if options.json:
        machine = {"device": info.devices[0].name, "kernels": info.kernels, "versions": dict(info.versions)}
        result = {**machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


def _shapes(length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    lens = {"q_lens": (length, length // 2), "k_lens": (length, length)}
    for group_size in GROUP_SIZES:
        yield f"g={group_size}", {**lens, "group_size": group_size}
    for head_dim in HEAD_DIMS:
        yield f"D={head_dim}", {**lens, "group_size": 3, "head_dim": head_dim}
    yield "D=192, Dv=128", {**lens, "head_dim": 192, "value_dim": 128}
    for block_size in BLOCK_SIZES:
        k_length = 2 * block_size + 7
        lens_k = {"q_lens": (length, 20), "k_lens": (max(length, k_length), k_length)}
        yield f"blocks of {block_size}", {**lens_k, "block_size": block_size}
    yield "q x 16", {**lens, "q_scale": 16.0}
    yield "not causal", {**lens, "causal": False}
    for index_heads in (1, 6):
        yield f"{index_heads} index heads of 6", {**lens, "group_size": 3, "index_heads": index_heads}
    for distribution in ("local", "same", "ragged", "empty_rows"):
        yield f"{distribution.replace('_', ' ')} choices", {**lens, "distribution": distribution}
    yield "decoding", {"q_lens": (1, 1, 1), "k_lens": (length, 17, 1)}


def _measure(client: AttentionClient, shape: str, case: Case) -> Row:
    p = case.problem
    q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k = (x.cpu() for x in case.tensors)
    answer = client.attend(
        q,
        k,
        v,
        BlockIndices(block_indices, p.block_size),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=p.causal,
        return_lse=True,
    )
    device = case.q.device
    assert answer.lse is not None
    out, lse = answer.out.to(device), answer.lse.to(device)
    try:
        assert_close_to_oracle(out, lse, case)
        ok = True
    except AssertionError:
        ok = False
    true_out, true_lse = case.oracle
    seen = true_lse > -torch.inf
    return Row(
        shape=shape,
        dtype=str(p.dtype).removeprefix("torch."),
        error=_largest(out, true_out),
        eager_error=_largest(eager_attention(case)[0], true_out),
        lse_error=_largest(lse[seen], true_lse[seen]),
        ok=ok,
    )


def _largest(x: torch.Tensor, truth: torch.Tensor) -> float:
    return (x.double() - truth).abs().max().item()


def _format(row: Row) -> str:
    errors = (f"{row.error:.1e}", f"{row.eager_error:.1e}", f"{row.error / row.eager_error:.2f}")
    return _line((row.shape, row.dtype, *errors, f"{row.lse_error:.1e}", "" if row.ok else "WRONG"))


def _line(columns: tuple[str, ...]) -> str:
    shape, dtype, *rest = columns
    return f"{shape:<20} {dtype:<9}" + "".join(f"{column:>11}" for column in rest)


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel on a small grid of shapes and selections, to be run under a checker: ``make sanitize``.

Forward on every path and backward, with ids that nobody validated, blocks that everybody chooses, rows that
choose nothing, packed sequences without keys or queries, and a workspace that must be cut. Shapes are few,
since each is compiled; so are tokens, since a checker makes every access slow. Answers are compared on
the CPU, so that hardly any kernel but ours runs. Exits 1 when an answer is wrong.

``python -m tests.sanitizer_grid --device cpu`` with TRITON_INTERPRET=1 runs it in Triton's interpreter.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from fsa_core.api import attend
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, PATHS
from tests.fsa_core.conftest import Case, assert_close_to_oracle, assert_gradients_close_to_oracle
from tests.fsa_core.conftest import _make_case as make_case

SHAPES: tuple[dict[str, Any], ...] = (
    {"group_size": 1, "head_dim": 32, "dtype": torch.float32},
    {"group_size": 3, "head_dim": 80, "value_dim": 48, "block_size": 64, "dtype": torch.bfloat16},
    {"group_size": 2, "head_dim": 64, "index_heads": 4, "dtype": torch.float16},
    {"group_size": 16, "head_dim": 128, "index_heads": 1, "block_size": 128, "dtype": torch.bfloat16},
    # A query tile of one token and one id, rows that fill no tile, and the smallest matrix products.
    {"group_size": 33, "head_dim": 16, "num_slots": 1, "num_kv_heads": 1, "dtype": torch.float16},
)
SELECTIONS = ("random", "local", "same", "ragged", "empty_rows", "wild")
# A sequence of one token, one without queries, one without keys, a chunk at the end of a longer one.
Q_LENS, K_LENS = (1, 0, 37, 5, 90), (70, 9, 37, 0, 200)
SMALL_WORKSPACE_BYTES = 1 << 16
WILD_IDS = (2**31 - 1, -(2**31), -7, 1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    failed = 0
    for name, case, ids, options in grid(device):
        try:
            check(case, ids, device, **options)
        except AssertionError as error:
            failed += 1
            print(f"{name}: {error}")
        else:
            print(f"{name}: right", flush=True)
    return 1 if failed else 0


def grid(device: torch.device) -> Iterator[tuple[str, Case, torch.Tensor, dict[str, Any]]]:
    """Names, cases on the CPU, the ids that the kernels are given for them, and path and workspace."""
    for shape, selection in product(SHAPES, SELECTIONS):
        # The interpreter's tl.dot is wrong for bfloat16.
        dtype = torch.float16 if device.type == "cpu" and shape["dtype"] == torch.bfloat16 else shape["dtype"]
        case = make_case(
            torch.device("cpu"),
            q_lens=Q_LENS,
            k_lens=K_LENS,
            distribution="ragged" if selection == "wild" else selection,
            **shape | {"dtype": dtype},
        )
        ids = case.block_indices
        name = (
            f"g={shape['group_size']} D={shape['head_dim']} {str(dtype).removeprefix('torch.')} {selection}"
        )
        if selection == "wild":
            wild = torch.tensor(WILD_IDS, dtype=torch.int32)[torch.arange(ids.numel()) % len(WILD_IDS)]
            ids = torch.where(ids == -1, wild.view_as(ids), ids)
        for path in PATHS:
            options = {"path": path, "workspace_limit_bytes": DEFAULT_WORKSPACE_BYTES}
            yield f"{name} {path}", case, ids, options
            if selection == "random":
                options = {"path": path, "workspace_limit_bytes": SMALL_WORKSPACE_BYTES}
                yield f"{name} {path}, small workspace", case, ids, options


def check(case: Case, ids: torch.Tensor, device: torch.device, **options: Any) -> None:
    """Raises AssertionError when outputs or gradients are further from the oracle than a test allows."""
    grad_out, grad_lse = case.output_gradients()
    operands = [x.to(device).requires_grad_() for x in (case.q, case.k, case.v)]
    rest = (x.to(device) for x in (ids, case.cu_seqlens_q, case.cu_seqlens_k))
    answer = attend(case.problem, *operands, *rest, backend="triton", **options)
    assert_close_to_oracle(*(x.detach().cpu() for x in answer), case)
    grads = torch.autograd.grad(answer, operands, [x.to(device) for x in (grad_out, grad_lse)])
    assert_gradients_close_to_oracle([x.cpu() for x in grads], case, grad_out, grad_lse)


if __name__ == "__main__":
    sys.exit(main())

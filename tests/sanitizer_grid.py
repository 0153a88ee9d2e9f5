"""Every kernel on a small grid of shapes and selections, to be run under a checker: ``make sanitize``.

Selected attention forward on every path and backward, with ids that nobody validated, blocks that everybody
chooses, rows that choose nothing, packed sequences without keys or queries, and a workspace that must be cut;
the check of ids; decode over pages; means and the other stages of the NSA operator, forward and backward.
Shapes are few, since each is compiled; so are tokens, since a checker makes every access slow. Answers are
compared on the CPU, so that hardly any kernel but ours runs. Exits 1 when an answer is wrong.

``python -m tests.sanitizer_grid --device cpu`` with TRITON_INTERPRET=1 runs it in Triton's interpreter,
``--only TEXT`` what has that in its name, and ``--twins`` leaves out the kernels for Hopper alone: racecheck
does not see how their groups of warps wait for one another, and reports every place that they hand over.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from fsa_core.api import attend
from fsa_core.decode import paged_selected_attention
from fsa_core.kernels import hopper
from fsa_core.nsa.functional import select_blocks
from fsa_core.nsa.gating import gated_sum_torch, gated_sum_triton
from fsa_core.nsa.reference import select_blocks_reference
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, PATHS, QUERY_TILE
from tests.fsa_core.conftest import (
    Case,
    PagedCase,
    assert_close_to_oracle,
    assert_gradients_close_to_oracle,
    sharing_rows,
)
from tests.fsa_core.conftest import _make_case as make_case
from tests.fsa_core.conftest import _make_paged as make_paged
from tests.fsa_core.nsa.conftest import Answer, Branch, Call
from tests.fsa_core.nsa.conftest import _make_call as make_call

CPU = torch.device("cpu")

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
OPERATOR_SHAPES: tuple[dict[str, Any], ...] = (
    {"group_size": 1, "head_dim": 32, "value_dim": 32, "dtype": torch.float16},
    {"group_size": 3, "head_dim": 80, "value_dim": 48, "dtype": torch.bfloat16},
    {"group_size": 16, "head_dim": 128, "value_dim": 128, "num_kv_heads": 1, "dtype": torch.bfloat16},
)
# Raises AssertionError when an answer is further from the oracle than a test allows.
Check = Callable[[], None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name has this in it")
    parser.add_argument("--twins", action="store_true", help="instead of kernels for Hopper alone")
    options = parser.parse_args()
    if options.twins:
        hopper.runs_on = lambda _device: False
    # Kernels that pay where there is much to copy run on what there is here.
    hopper.MIN_FORWARD_BYTES = hopper.MIN_GRADIENT_BYTES = 0
    failed = 0
    for name, check in grid(torch.device(options.device)):
        if options.only not in name:
            continue
        try:
            check()
        except AssertionError as error:
            failed += 1
            print(f"{name}: {error}")
        else:
            print(f"{name}: right", flush=True)
    return 1 if failed else 0


def grid(device: torch.device) -> Iterator[tuple[str, Check]]:
    for name, case, ids, options in selections(device):
        yield f"selected {name}", partial(check_selected, case, ids, device, **options)
    for shape in OPERATOR_SHAPES:
        sizes = shape | {"dtype": dtype_on(device, shape["dtype"])}
        name = f"g={sizes['group_size']} D={sizes['head_dim']} {name_of(sizes['dtype'])}"
        call = make_call(CPU, q_lens=Q_LENS, k_lens=K_LENS, **sizes)
        for branch in ("compressed", "window"):
            yield f"{branch} {name}", BranchOn(device, branch, call, backend="triton").check
        # Rounded scores may order near ties otherwise than the oracle.
        exact = make_call(CPU, q_lens=Q_LENS, k_lens=K_LENS, **sizes | {"dtype": torch.float32})
        yield f"selection {name}", partial(check_selection, exact, device)
        yield f"decode {name}", partial(check_decode, make_paged(CPU, k_lens=(70, 0, 200), **sizes), device)
        yield f"gates {name}", partial(check_gates, sizes["value_dim"], sizes["dtype"], device)
        yield f"means {name}", partial(check_means, sizes["head_dim"], sizes["dtype"], device)
    # What the kernel for Hopper takes: 16 bits, and more tokens than a tile has.
    for head_dim in (64, 128):
        sizes = {"group_size": 3, "head_dim": head_dim, "dtype": dtype_on(device, torch.bfloat16)}
        call = make_call(CPU, q_lens=(290, 7), k_lens=(1700, 90), **sizes)
        name = f"g=3 D={head_dim} {name_of(sizes['dtype'])}, many tokens"
        yield f"selection {name}", partial(check_selection, call, device)


def dtype_on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The interpreter's tl.dot is wrong for bfloat16."""
    return torch.float16 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def selections(device: torch.device) -> Iterator[tuple[str, Case, torch.Tensor, dict[str, Any]]]:
    """Names, cases on the CPU, the ids that the kernels are given for them, and path and workspace."""
    for shape, selection in product(SHAPES, SELECTIONS):
        dtype = dtype_on(device, shape["dtype"])
        case = make_case(
            CPU,
            q_lens=Q_LENS,
            k_lens=K_LENS,
            distribution="ragged" if selection == "wild" else selection,
            **shape | {"dtype": dtype},
        )
        name = f"g={shape['group_size']} D={shape['head_dim']} {name_of(dtype)} {selection}"
        calls = [(name, case, PATHS)]
        if selection in ("random", "wild"):
            calls.append((f"{name}, shared rows", sharing_rows(case, 64), (QUERY_TILE,)))
        for called, given, paths in calls:
            ids = _with_wild_ids(given) if selection == "wild" else given.block_indices
            for path in paths:
                options = {"path": path, "workspace_limit_bytes": DEFAULT_WORKSPACE_BYTES}
                yield f"{called} {path}", given, ids, options
                if selection == "random":
                    options = {"path": path, "workspace_limit_bytes": SMALL_WORKSPACE_BYTES}
                    yield f"{called} {path}, small workspace", given, ids, options


def _with_wild_ids(case: Case) -> torch.Tensor:
    """In unused slots what names no block."""
    ids = case.block_indices
    wild = torch.tensor(WILD_IDS, dtype=torch.int32)[torch.arange(ids.numel()) % len(WILD_IDS)]
    return torch.where(ids == -1, wild.view_as(ids), ids)


def check_selected(case: Case, ids: torch.Tensor, device: torch.device, **options: Any) -> None:
    """The check of ids, outputs and gradients."""
    grad_out, grad_lse = case.output_gradients()
    operands = [x.to(device).requires_grad_() for x in (case.q, case.k, case.v)]
    rest = [x.to(device) for x in (ids, case.cu_seqlens_q, case.cu_seqlens_k)]
    check_validity(case, ids, *rest)
    answer = attend(case.problem, *operands, *rest, backend="triton", **options)
    assert_close_to_oracle(*(x.detach().cpu() for x in answer), case)
    grads = torch.autograd.grad(answer, operands, [x.to(device) for x in (grad_out, grad_lse)])
    assert_gradients_close_to_oracle([x.cpu() for x in grads], case, grad_out, grad_lse)


def check_validity(case: Case, ids: torch.Tensor, *on_device: torch.Tensor) -> None:
    # Triton may be imported once its interpreter is chosen.
    from fsa_core.kernels.index_check import certainly_valid

    p = case.problem
    fast = certainly_valid(*on_device, p.num_k_tokens, block_size=p.block_size, causal=p.causal)
    assert not (fast and (ids < -1).any()), "ids that nobody may give are found valid"


class BranchOn(Branch):
    """A branch of a call that lies on the CPU, computed on ``device``."""

    def __init__(self, device: torch.device, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device = device

    def run(self, *operands: torch.Tensor, **options: Any) -> Answer:
        starts = {name: getattr(self.call, name).to(self.device) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        out, lse = super().run(*(x.to(self.device) for x in operands), **starts, **options)
        return out.cpu(), lse.cpu()


def check_selection(call: Call, device: torch.device) -> None:
    q, k_cmp, starts_q, starts_k = (
        x.to(device) for x in (call.q, call.k_cmp, call.cu_seqlens_q, call.cu_seqlens_k)
    )
    options: dict[str, Any] = {"config": call.config, "softmax_scale": call.softmax_scale}
    got = select_blocks(q, k_cmp, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, backend="triton", **options)
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
    assert torch.equal(got.cpu(), select_blocks_reference(call.q, call.k_cmp, *rest)), "other blocks"


def check_gates(value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """The gated sum and its gradients, of rows that fill no tile."""
    generator = torch.Generator().manual_seed(0)
    *branches, grad = (torch.randn(37, 3, value_dim, generator=generator).to(dtype) for _ in range(4))
    gates = torch.rand(37, 3, 3, generator=generator)
    answers = []
    for function, where in ((gated_sum_torch, CPU), (gated_sum_triton, device)):
        operands = [x.to(where).requires_grad_() for x in (*branches, gates)]
        out = function((operands[0], operands[1], operands[2]), operands[3])
        grads = torch.autograd.grad(out, operands, grad.to(where))
        answers.append([x.detach().float().cpu() for x in (out, *grads)])
    for expected, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def check_means(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """The means of windows and their gradients, of sequences that fill no tile."""
    # Triton may be imported once its interpreter is chosen.
    from fsa_core.kernels.means import means, spread

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 77, 3, head_dim, generator=generator).to(dtype)
    true = x.double().requires_grad_()
    expected = true.unfold(1, 8, 3).mean(-1)
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, true, grad.double())
    got = means(x.to(device), 8, 3), spread(grad.to(device), 77, 8, 3)
    for found, wanted in zip(got, (expected, expected_grad), strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted.detach(), rtol=1e-2, atol=1e-2)


def check_decode(paged: PagedCase, device: torch.device) -> None:
    tensors = {name: None if x is None else x.to(device) for name, x in paged.tensors.items()}
    p = paged.case.problem
    options: dict[str, Any] = {"block_size": p.block_size, "softmax_scale": p.softmax_scale}
    answer = paged_selected_attention(**tensors, **options, backend="triton")
    assert_close_to_oracle(*(x.cpu() for x in answer), paged.case)


if __name__ == "__main__":
    sys.exit(main())

"""Which implementation runs the operator's own stages: Triton kernels, or torch operations.

``backend`` is one of ``fsa_core.api`` or "torch"; what does not come to "triton" is torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fsa_core.api import resolve_backend
from fsa_core.autocast import in_own_precision
from fsa_core.autograd import Answer, Gradients, Implementation, differentiable_attention
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.gating import gated_sum_torch, gated_sum_triton
from fsa_core.nsa.selection import compressed_attention_torch, select_blocks_torch, spend_budget
from fsa_core.nsa.validation import Call
from fsa_core.nsa.window import sliding_window_attention_torch
from fsa_core.problem import Problem
from fsa_core.validation import validate_dense

# Triton is imported when a kernel is first needed.
if TYPE_CHECKING:
    from fsa_core.kernels.selection import Blocks
    from fsa_core.kernels.windows import RowShares, Windows

    Sizes = tuple[Problem, Windows]

# A window that reaches further sees the whole sequence. Kernels add it to positions in 32 bits.
MAX_REACH = 2**30
# Of a stage by itself. In the operator, for which "cpu" or "reference" may be asked, it is torch operations.
STAGE_BACKENDS = ("auto", "triton", "torch")


@in_own_precision
def attend_windows(
    call: Call, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, backend: str
) -> Answer:
    """Attention over the windows that each query sees: out and lse, differentiable."""
    if not runs_kernels(backend, q):
        return compressed_attention_torch(call, q, k_cmp, v_cmp)
    return _attend(call, kernel_sizes(call, q, k_cmp, v_cmp), q, k_cmp, v_cmp)[0]


@in_own_precision
def attend_last_keys(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> Answer:
    """Attention over the last ``window`` keys up to a query's own: out and lse, differentiable."""
    if not runs_kernels(backend, q):
        return sliding_window_attention_torch(call, q, k, v)
    from fsa_core.kernels.compressed import window_attention_forward

    problem, windows = window_sizes(call, q, k, v)

    def forward(problem: Problem, *operands: torch.Tensor) -> Answer:
        return window_attention_forward(problem, windows, *operands)

    return _differentiable(call, windows, forward, problem, q, k, v)


@in_own_precision
def choose_blocks(call: Call, q: torch.Tensor, k_cmp: torch.Tensor, backend: str) -> torch.Tensor:
    """int32 [num_kv_heads, num_q_tokens, top_k], ascending, then -1."""
    if not runs_kernels(backend, q):
        return select_blocks_torch(call, q, k_cmp)
    return _choose(call, kernel_sizes(call, q, k_cmp, k_cmp), q, k_cmp, None, backend)


@in_own_precision
def attend_and_choose(
    call: Call, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, backend: str
) -> tuple[Answer, torch.Tensor]:
    """The answers of the two above; what makes scores probabilities is computed once."""
    if not runs_kernels(backend, q):
        return compressed_attention_torch(call, q, k_cmp, v_cmp), select_blocks_torch(call, q, k_cmp)
    sizes = kernel_sizes(call, q, k_cmp, v_cmp)
    answer, shares = _attend(call, sizes, q, k_cmp, v_cmp)
    return answer, _choose(call, sizes, q, k_cmp, shares, backend)


@in_own_precision
def add_branches(branches: tuple[torch.Tensor, ...], gates: torch.Tensor, backend: str) -> torch.Tensor:
    """Each branch times its gate, added up."""
    if len(branches) == 3 and runs_kernels(backend, branches[0]):
        return gated_sum_triton(branches, gates)
    return gated_sum_torch(branches, gates)


def check_stage_backend(backend: str, q: torch.Tensor) -> None:
    """Raises ValueError unless a stage by itself can run on ``backend``: it has no others than these."""
    if backend not in STAGE_BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(STAGE_BACKENDS)}")
    if backend != "torch":
        resolve_backend(backend, q.device)


def runs_kernels(backend: str, q: torch.Tensor) -> bool:
    # Kernels are launched for at least one query.
    return backend != "torch" and resolve_backend(backend, q.device) == "triton" and len(q) > 0


def launches_alone(call: Call, q: torch.Tensor, k_cmp: torch.Tensor, backend: str) -> bool:
    """Whether all stages are launches of kernels: some choices of blocks are made in torch operations."""
    if call.config.has_budget or not runs_kernels(backend, q):
        return False
    from fsa_core.kernels.selection import takes

    return takes(*kernel_sizes(call, q, k_cmp, k_cmp), _blocks(call.config))


def _blocks(config: NSAConfig) -> "Blocks":
    from fsa_core.kernels.selection import Blocks

    return Blocks(config.block_size, config.top_k, config.num_first_blocks, config.num_local_blocks)


def _attend(
    call: Call, sizes: "Sizes", q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor
) -> tuple[Answer, "RowShares"]:
    from fsa_core.kernels.compressed import compressed_attention_forward

    problem, windows = sizes
    shares = []

    def forward(problem: Problem, *operands: torch.Tensor) -> Answer:
        out, lse, found = compressed_attention_forward(problem, windows, *operands)
        shares.append(found)
        return out, lse

    answer = _differentiable(call, windows, forward, problem, q, k_cmp, v_cmp)
    # Taken out: autograd keeps the implementation, and with it the list, until the backward pass.
    return answer, shares.pop()


def interval_gradients(call: Call, sizes: "Sizes", *tensors: Any) -> Gradients:
    """Of attention over windows, by kernels: tensors as of ``interval_attention_backward``."""
    from fsa_core.kernels.interval_gradients import interval_attention_backward

    return interval_attention_backward(*sizes, *tensors, workspace_limit_bytes=call.workspace_limit_bytes)


def _differentiable(
    call: Call, windows: "Windows", forward: Callable[..., Answer], problem: Problem, *operands: torch.Tensor
) -> Answer:
    """``forward(problem, q, k, v)``; where windows start is saved, so that torch sees it change."""
    starts = versioned(windows.starts)

    def of_operands(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Answer:
        return forward(problem, q, k, v)

    def backward(problem: Problem, *tensors: Any) -> Gradients:
        return interval_gradients(call, (problem, windows), *tensors[:3], *tensors[3 + len(starts) :])

    implementation = Implementation(of_operands, backward)
    return differentiable_attention(implementation, problem, *(x.contiguous() for x in operands), *starts)


def versioned(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Those that torch counts changes of, and lets be saved: tensors of inference mode it does not."""
    return [x for x in tensors if not x.is_inference()]


@torch.no_grad()
def _choose(
    call: Call,
    sizes: "Sizes",
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    shares: "RowShares | None",
    backend: str,
) -> torch.Tensor:
    from fsa_core.kernels.compressed import row_shares
    from fsa_core.kernels.selection import select_blocks_forward, takes

    config, blocks = call.config, _blocks(call.config)
    if not takes(*sizes, blocks):
        if backend == "triton":
            raise ValueError(
                f"backend 'triton' does not select {config.top_k} blocks of {config.block_size} keys from "
                f"windows of {config.kernel_size} at stride {config.stride}, with keys of "
                f"{q.shape[2]} channels of {q.dtype}; 'auto' does, in torch operations"
            )
        return select_blocks_torch(call, q, k_cmp)
    q, k_cmp = q.detach().contiguous(), k_cmp.detach().contiguous()
    shares = row_shares(*sizes, q, k_cmp) if shares is None else shares
    selection = select_blocks_forward(*sizes, blocks, q, k_cmp, shares, with_importance=config.has_budget)
    if selection.importance is None or selection.total is None:
        return selection.ids
    return spend_budget(call, selection.ids, selection.importance, selection.total)


def kernel_sizes(call: Call, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor) -> "Sizes":
    """A call's sizes and windows as the kernels take them."""
    from fsa_core.kernels.windows import Windows

    starts = (call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous(), call.cu_seqlens_cmp)
    windows = Windows(call.config.kernel_size, call.config.stride, *starts)
    return _problem(call, q, k_cmp, v_cmp, starts[0], starts[2]), windows


def window_sizes(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> "Sizes":
    """The same of sliding-window attention: every key is a window of its own."""
    from fsa_core.kernels.windows import Windows

    starts = (call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous())
    windows = Windows(1, 1, *starts, starts[1], reach=min(call.config.window, MAX_REACH))
    return _problem(call, q, k, v, *starts), windows


def _problem(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> Problem:
    return validate_dense(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=call.softmax_scale,
        causal=True,
        check_values=False,
    )

"""The gated sum of three branches and its gradients: every number is read once and written once.

Torch operations would write products and sums in float32 between them: several times the traffic.
"""

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import kernel
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.sizes import padded_dim

# Of a program: what four warps load in two turns.
NUMBERS = 4096

Branches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _rows_and_numbers(num_rows, VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Rows of this program and which exist, and where their numbers lie and which exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, VALUE_DIM_PADDED)
    row_mask = rows < num_rows
    places = rows[:, None] * VALUE_DIM + dims[None, :]
    return rows, row_mask, places, row_mask[:, None] & (dims < VALUE_DIM)[None, :]


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@kernel
def _gated_sum(
    first_ptr,
    second_ptr,
    third_ptr,
    gates_ptr,
    out_ptr,
    num_rows,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, row_mask, places, mask = _rows_and_numbers(num_rows, VALUE_DIM, VALUE_DIM_PADDED, ROWS)
    gate_ptrs = gates_ptr + rows * 3
    total = _load(gate_ptrs, row_mask)[:, None] * _load(first_ptr + places, mask)
    total += _load(gate_ptrs + 1, row_mask)[:, None] * _load(second_ptr + places, mask)
    total += _load(gate_ptrs + 2, row_mask)[:, None] * _load(third_ptr + places, mask)
    tl.store(out_ptr + places, total, mask=mask)


@triton.jit
def _store_gradients(branch_ptr, gate_ptr, grad_branch_ptr, grad_gate_ptr, grad_out, row_mask, mask):
    gate = _load(gate_ptr, row_mask)
    grad_gate = tl.sum(grad_out * _load(branch_ptr, mask), 1)
    tl.store(grad_gate_ptr, grad_gate, mask=row_mask)
    tl.store(grad_branch_ptr, grad_out * gate[:, None], mask=mask)


@kernel
def _gradients_of_gated_sum(
    first_ptr,
    second_ptr,
    third_ptr,
    gates_ptr,
    grad_out_ptr,
    grad_first_ptr,
    grad_second_ptr,
    grad_third_ptr,
    grad_gates_ptr,
    num_rows,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, row_mask, places, mask = _rows_and_numbers(num_rows, VALUE_DIM, VALUE_DIM_PADDED, ROWS)
    grad_out = _load(grad_out_ptr + places, mask)
    gate_ptrs = gates_ptr + rows * 3
    grad_gate_ptrs = grad_gates_ptr + rows * 3
    _store_gradients(
        first_ptr + places, gate_ptrs, grad_first_ptr + places, grad_gate_ptrs, grad_out, row_mask, mask
    )
    _store_gradients(
        second_ptr + places, gate_ptrs + 1, grad_second_ptr + places, grad_gate_ptrs + 1, grad_out, row_mask,
        mask,
    )  # fmt: skip
    _store_gradients(
        third_ptr + places, gate_ptrs + 2, grad_third_ptr + places, grad_gate_ptrs + 2, grad_out, row_mask,
        mask,
    )  # fmt: skip


def gated_sum_forward(branches: Branches, gates: torch.Tensor) -> torch.Tensor:
    """Each branch [num_q_tokens, num_q_heads, value_dim] times its gate, added in float32, in their dtype.

    gates: [num_q_tokens, num_q_heads, 3]. All contiguous, at least one row.
    """
    dtypes = (*(x.dtype for x in branches), gates.dtype)
    (out,) = _replayed((*branches, gates), tuple(branches[0].shape), dtypes)
    return out


def _forward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    shape: tuple[int, ...],
    _dtypes: tuple[torch.dtype, ...],
) -> None:
    """Of three branches of that shape, and gates; what is launched depends on their dtypes."""
    out = memory.answer(*shape)
    grid, constants = _sizes(out)
    _gated_sum[grid](*tensors, out, out.numel() // shape[-1], **constants)


_replayed = Replayed(_forward)


def gated_sum_backward(
    branches: Branches, gates: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of the three branches and of the gates, each in its own dtype."""
    dtypes = (*(x.dtype for x in branches), gates.dtype, grad_out.dtype)
    return _replayed_gradients((*branches, gates, grad_out), tuple(grad_out.shape), dtypes)


def _backward(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Of branches of that shape, gates and the sum's gradient, which have these dtypes."""
    grads = [memory.answer(*shape, dtype=dtype) for dtype in dtypes[:3]]
    grads.append(memory.answer(*shape[:-1], 3, dtype=dtypes[3]))
    grid, constants = _sizes(grads[0])
    num_rows = grads[0].numel() // shape[-1]
    _gradients_of_gated_sum[grid](*tensors, *grads, num_rows, **constants)


_replayed_gradients = Replayed(_backward)


def _sizes(x: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    value_dim = x.shape[-1]
    rows = NUMBERS // padded_dim(value_dim)
    constants = {"VALUE_DIM": value_dim, "VALUE_DIM_PADDED": padded_dim(value_dim), "ROWS": rows}
    return (-(-x.numel() // value_dim // rows),), constants

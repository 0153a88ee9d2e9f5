"""The means of windows of tokens, and their gradients: every number is read once or twice and written once.

Torch's unfold reads a window's tokens one by one, and its gradient takes ten times as long again.
"""

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import Kernel, kernel

# Of a program: rows of windows or of tokens, and numbers of each.
ROWS, COLUMNS = 32, 128


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's sequence, rows and columns, and which of them exist."""
    num_tiles = tl.cdiv(num_rows, ROWS)
    sequence = (tl.program_id(0) // num_tiles).to(tl.int64)
    rows = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return sequence, rows, columns[None, :], (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


@kernel
def _means(
    x_ptr,
    out_ptr,
    length,
    num_windows,
    num_columns,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence, windows, columns, mask = _tile(num_windows, num_columns, ROWS, COLUMNS)
    ptrs = x_ptr + (sequence * length + windows * STRIDE)[:, None] * num_columns + columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(KERNEL_SIZE):
        total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        ptrs += num_columns
    places = (sequence * num_windows + windows)[:, None] * num_columns + columns
    tl.store(out_ptr + places, total / KERNEL_SIZE, mask=mask)


@kernel
def _spread(
    grad_ptr,
    grad_x_ptr,
    length,
    num_windows,
    num_columns,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence, tokens, columns, mask = _tile(length, num_columns, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # From the last window that begins at or before a token to the first that has it.
    for back in range((KERNEL_SIZE + STRIDE - 1) // STRIDE):
        window = tokens // STRIDE - back
        has_token = (window >= 0) & (window < num_windows) & (tokens - window * STRIDE < KERNEL_SIZE)
        places = (sequence * num_windows + window)[:, None] * num_columns + columns
        total += tl.load(grad_ptr + places, mask=mask & has_token[:, None], other=0.0).to(tl.float32)
    places = (sequence * length + tokens)[:, None] * num_columns + columns
    tl.store(grad_x_ptr + places, total / KERNEL_SIZE, mask=mask)


def means(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """[num_sequences, windows, heads, dim] of contiguous x [num_sequences, length, heads, dim], in its dtype.

    Window i has the tokens [i * stride, i * stride + kernel_size), and there is at least one; sums are
    float32.
    """
    num_windows = (x.shape[1] - kernel_size) // stride + 1
    out = x.new_empty(x.shape[0], num_windows, *x.shape[2:])
    _launch(_means, x, out, num_windows, x.shape[1], num_windows, kernel_size, stride)
    return out


def spread(grad: torch.Tensor, length: int, kernel_size: int, stride: int) -> torch.Tensor:
    """The gradient of x, so many tokens a sequence, from that of its ``means``; contiguous both."""
    grad_x = grad.new_empty(grad.shape[0], length, *grad.shape[2:])
    _launch(_spread, grad, grad_x, length, length, grad.shape[1], kernel_size, stride)
    return grad_x


def _launch(
    walk: Kernel,
    given: torch.Tensor,
    made: torch.Tensor,
    num_rows: int,
    length: int,
    num_windows: int,
    kernel_size: int,
    stride: int,
) -> None:
    num_columns = given.shape[2] * given.shape[3]
    grid = (given.shape[0] * -(-num_rows // ROWS), -(-num_columns // COLUMNS))
    walk[grid](
        given, made, length, num_windows, num_columns, KERNEL_SIZE=kernel_size, STRIDE=stride, ROWS=ROWS,
        COLUMNS=COLUMNS,
    )  # fmt: skip

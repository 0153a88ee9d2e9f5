"""The means of windows of tokens, and their gradients: every number is read once or twice and written once.

Torch's unfold reads a window's tokens one by one, and its gradient takes ten times as long again.
"""

import torch
import triton
import triton.language as tl

from fsa_core.kernels.launch import kernel

# Of a program of four warps: windows or tokens, and numbers of each. 16 bytes a thread, or 32.
WINDOWS, TOKENS, COLUMNS = 8, 16, 128
# Loads that are on their way at once; one after the other they would wait for memory each.
UNROLLED = 8


@triton.jit
def _tile(num_rows, NUMBERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's sequence, its first row, its rows from there, its columns, and what exists."""
    num_tiles = tl.cdiv(num_rows, ROWS)
    sequence = (tl.program_id(0) // num_tiles).to(tl.int64)
    first = tl.program_id(0) % num_tiles * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows - first)[:, None] & (columns < NUMBERS)[None, :]
    return sequence, first, rows, columns[None, :], mask


@kernel
def _means(
    x_ptr,
    out_ptr,
    length,
    num_windows,
    NUMBERS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence, first, windows, columns, mask = _tile(num_windows, NUMBERS, ROWS, COLUMNS)
    x_ptr += (sequence * length + first * STRIDE) * NUMBERS
    offsets = windows[:, None] * (STRIDE * NUMBERS) + columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for token in tl.range(0, KERNEL_SIZE, loop_unroll_factor=UNROLL):
        total += tl.load(x_ptr + token * NUMBERS + offsets, mask=mask, other=0.0).to(tl.float32)
    out_ptr += (sequence * num_windows + first) * NUMBERS
    tl.store(out_ptr + windows[:, None] * NUMBERS + columns, total / KERNEL_SIZE, mask=mask)


@kernel
def _spread(
    grad_ptr,
    grad_x_ptr,
    length,
    num_windows,
    NUMBERS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence, first, rows, columns, mask = _tile(length, NUMBERS, ROWS, COLUMNS)
    tokens = first + rows
    grad_ptr += sequence * num_windows * NUMBERS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # From the last window that begins at or before a token to the first that has it.
    for back in tl.range(0, (KERNEL_SIZE + STRIDE - 1) // STRIDE, loop_unroll_factor=UNROLL):
        window = tokens // STRIDE - back
        has_token = (window >= 0) & (window < num_windows) & (tokens - window * STRIDE < KERNEL_SIZE)
        places = window.to(tl.int64)[:, None] * NUMBERS + columns
        total += tl.load(grad_ptr + places, mask=mask & has_token[:, None], other=0.0).to(tl.float32)
    grad_x_ptr += (sequence * length + first) * NUMBERS
    tl.store(grad_x_ptr + rows[:, None] * NUMBERS + columns, total / KERNEL_SIZE, mask=mask)


def means(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """[num_sequences, windows, heads, dim] of contiguous x [num_sequences, length, heads, dim], in its dtype.

    Window i has the tokens [i * stride, i * stride + kernel_size), and there is at least one; sums are
    float32.
    """
    num_windows = (x.shape[1] - kernel_size) // stride + 1
    numbers = x.shape[2] * x.shape[3]
    out = x.new_empty(x.shape[0], num_windows, *x.shape[2:])
    grid = (x.shape[0] * -(-num_windows // WINDOWS), -(-numbers // COLUMNS))
    _means[grid](
        x, out, x.shape[1], num_windows, NUMBERS=numbers, KERNEL_SIZE=kernel_size, STRIDE=stride,
        UNROLL=min(kernel_size, UNROLLED), ROWS=WINDOWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


def spread(grad: torch.Tensor, length: int, kernel_size: int, stride: int) -> torch.Tensor:
    """The gradient of x, so many tokens a sequence, from that of its ``means``; contiguous both."""
    numbers = grad.shape[2] * grad.shape[3]
    grad_x = grad.new_empty(grad.shape[0], length, *grad.shape[2:])
    grid = (grad.shape[0] * -(-length // TOKENS), -(-numbers // COLUMNS))
    _spread[grid](
        grad, grad_x, length, grad.shape[1], NUMBERS=numbers, KERNEL_SIZE=kernel_size, STRIDE=stride,
        UNROLL=min(-(-kernel_size // stride), UNROLLED), ROWS=TOKENS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return grad_x

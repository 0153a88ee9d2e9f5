"""What the gradients of every row of scores subtract, where no kernel that reads its rows anyway makes it."""

import torch
import triton.language as tl

from fsa_core.kernels.launch import kernel
from fsa_core.sizes import padded_dim

DELTA_ROWS = 16


@kernel
def _delta(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    delta_ptr,
    num_tokens,
    first_delta_head,
    num_delta_heads,
    NUM_Q_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    WITH_GRAD_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tokens = rows // num_delta_heads
    row_mask = tokens < num_tokens
    places = tokens * NUM_Q_HEADS + first_delta_head + rows % num_delta_heads
    dims = tl.arange(0, VALUE_DIM_PADDED)
    mask = row_mask[:, None] & (dims < VALUE_DIM)[None, :]
    out = tl.load(out_ptr + places[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    grad_out = tl.load(grad_out_ptr + places[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if WITH_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + places, mask=row_mask, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=row_mask)


def write_delta(
    out: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    first_head: int = 0,
) -> None:
    """delta = sum(out * grad_out) - grad_lse of the query heads from ``first_head`` on.

    out, grad_out [num_q_tokens, num_q_heads, value_dim], grad_lse float32 [num_q_tokens, num_q_heads] or
    None for zeros, at least one token; delta float32 [num_q_tokens, heads] is written. All contiguous.
    """
    num_tokens, num_heads = delta.shape
    _delta[(-(-num_tokens * num_heads // DELTA_ROWS),)](
        out, grad_out, delta if grad_lse is None else grad_lse, delta, num_tokens, first_head, num_heads,
        NUM_Q_HEADS=out.shape[1], VALUE_DIM=out.shape[2], VALUE_DIM_PADDED=padded_dim(out.shape[2]),
        WITH_GRAD_LSE=grad_lse is not None, ROWS=DELTA_ROWS,
    )  # fmt: skip

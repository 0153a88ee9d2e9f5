"""The inversion of block_indices alone, as the forward pass on ``kv_major`` does it before it attends."""

import torch

from benchmarks.cases import Stage
from benchmarks.contenders import Answer, Run
from benchmarks.inputs import Inputs
from fsa_core import plan
from fsa_core.kernels import hopper
from fsa_core.kernels.chunk_buffers import chunk_buffers
from fsa_core.kernels.index import Inversion, invert
from fsa_core.kernels.partials import MOST_KEYS
from fsa_core.validation import validate_selected


def prepare_inversion(x: Inputs, stage: Stage) -> Run:
    """A call that inverts all of block_indices, and gives (pairs, offsets) with a row a head and chunk."""
    problem = validate_selected(
        x.q, x.k, x.v, x.block_indices, block_size=x.block_size, check_values=False,
        cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=True, query_block_size=1,
    )  # fmt: skip
    buffers = chunk_buffers(problem, x.q.device, MOST_KEYS, hopper.MIN_FORWARD_BYTES)
    forward = plan.plan_forward(problem, buffers=buffers)
    heads, tokens, slots = x.block_indices.shape
    num_chunks = -(-tokens // forward.chunk_tokens)
    rows = heads * num_chunks

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=x.q.device)

    inversion = Inversion(
        counts=int32(rows, forward.segments, plan.counter_ints(forward.segments)),
        ranks=int32(heads, tokens, slots),
        used=int32(heads, tokens, forward.used_words),
        pairs=int32(heads, tokens * slots),
        offsets=int32(rows, forward.segments + 1),
        item_offsets=int32(rows, forward.segments + 1),
        items=int32(rows, forward.max_items, plan.RECORD_INTS if forward.is_buffered else 1),
    )
    sizes = torch.tensor([heads, num_chunks, forward.chunk_tokens, tokens, slots])

    def run() -> Answer:
        invert(
            inversion, x.block_indices, x.cu_seqlens, x.cu_seqlens, first_token=0, num_tokens=tokens,
            first_head=0, num_heads=heads, chunk_tokens=forward.chunk_tokens, block_size=x.block_size,
            pairs_per_item=forward.tile.pairs_per_item, causal=True, mark_unused=not forward.is_buffered,
        )  # fmt: skip
        return inversion.pairs, inversion.offsets, sizes

    return run


def segments_of_pairs(answer: Answer) -> Answer:
    """The inversion inverted: the block that lists each (token, slot), or -1; [tokens, heads, slots]."""
    pairs, offsets, sizes = answer
    heads, num_chunks, chunk_tokens, tokens, slots = sizes.tolist()
    found = torch.full((tokens, heads, slots), -1, device=pairs.device)
    for head in range(heads):
        for chunk in range(num_chunks):
            ends = offsets[head * num_chunks + chunk].long()
            listed = pairs[head, chunk * chunk_tokens * slots :][: ends[-1]].long()
            block = torch.repeat_interleave(torch.arange(len(ends) - 1, device=pairs.device), ends.diff())
            token = chunk * chunk_tokens + (listed >> plan.SLOT_BITS)
            found[token, head, listed & ((1 << plan.SLOT_BITS) - 1)] = block
    return (found,)

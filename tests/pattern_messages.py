"""One selection of blocks, said in each way that a request can say it."""

import torch

from service.pb.fsa.v1 import pattern_pb2
from tests.serving import tensor_message

Pattern = pattern_pb2.SparsityPattern


def block_indices(rows: torch.Tensor, block_size: int, query_block_size: int = 1) -> Pattern:
    """``rows``: int32 [heads, rows, slots], -1 in unused slots."""
    sizes = {"block_size": block_size, "query_block_size": query_block_size}
    return Pattern(block_indices=pattern_pb2.BlockIndices(indices=tensor_message(rows), **sizes))


def block_csr(rows: torch.Tensor, block_size: int, query_block_size: int = 1) -> Pattern:
    """The ids of ``rows`` that are used, in their order."""
    heads, num_rows, _ = rows.shape
    ends = torch.nn.functional.pad((rows >= 0).sum(-1).flatten().cumsum(0), (1, 0)).int()
    offsets = [ends[head * num_rows : (head + 1) * num_rows + 1] for head in range(heads)]
    return Pattern(
        block_csr=pattern_pb2.BlockCsr(
            offsets=tensor_message(torch.stack(offsets)),
            indices=tensor_message(rows[rows >= 0]),
            block_size=block_size,
            query_block_size=query_block_size,
        )
    )


def block_mask(rows: torch.Tensor, block_size: int, query_block_size: int = 1, *, num_blocks: int) -> Pattern:
    """``num_blocks``: those of the longest sequence."""
    mask = torch.zeros(*rows.shape[:2], num_blocks + 1, dtype=torch.bool)
    mask.scatter_(-1, rows.long().where(rows >= 0, num_blocks), True)
    sizes = {"block_size": block_size, "query_block_size": query_block_size}
    return Pattern(block_mask=pattern_pb2.BlockMask(mask=tensor_message(mask[..., :-1]), **sizes))


def vertical_slash(vertical: torch.Tensor, slash: torch.Tensor, block_size: int) -> Pattern:
    return Pattern(
        vertical_slash=pattern_pb2.VerticalSlash(
            vertical=tensor_message(vertical), slash=tensor_message(slash), block_size=block_size
        )
    )

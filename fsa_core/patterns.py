"""Sparsity patterns, and the one normal form that everything after them knows: a row a query token.

What other systems produce becomes ``BlockIndices`` first: ``from_csr`` (FlashInfer's BSR, dynamic budgets),
``from_block_mask`` (SeerAttention, XAttention), ``from_vertical_slash`` (MInference), ``all_blocks`` (dense).
These check what they read; the ids that come out of them are checked by ``selected_attention`` as any others.
Their masks of rows times blocks are made a part at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F

from fsa_core.errors import InputError
from fsa_core.packing import place_queries, row_starts

# Entries of a mask of rows times blocks that exist at a time; each costs some 30 bytes on the way.
MASK_ENTRIES_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class BlockIndices:
    """Selected KV blocks: int32 ``indices`` [1 | num_kv_heads | num_q_heads, rows, num_slots].

    Each row lists block ids inside its own sequence, -1 in unused slots, for ``query_block_size`` queries
    counted from the first query of each sequence. ``block_size`` is in keys.
    """

    indices: torch.Tensor
    block_size: int
    query_block_size: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """Full attention."""


Pattern = BlockIndices | Dense


def expand_query_blocks(
    block_indices: torch.Tensor,
    *,
    query_block_size: int,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    num_q_tokens: int | None = None,
) -> torch.Tensor:
    """The normal form of validated indices: int32 [heads, num_q_tokens, num_slots], one row a token.

    Under ``causal`` a row may name blocks that only its later queries reach; for the earlier ones they
    become -1. ``num_q_tokens`` saves reading it from ``cu_seqlens_q`` (a synchronisation on CUDA).
    """
    if query_block_size == 1:
        return block_indices
    num_q_tokens = int(cu_seqlens_q[-1]) if num_q_tokens is None else num_q_tokens
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, num_q_tokens, causal=causal)
    starts = row_starts(cu_seqlens_q, query_block_size)[placed.sequence]
    token = torch.arange(num_q_tokens, device=block_indices.device)
    row = starts + (token - cu_seqlens_q[placed.sequence]) // query_block_size
    ids = block_indices[:, row.clamp_(0, max(block_indices.shape[1] - 1, 0))]
    if causal:
        num_visible_blocks = -(-placed.num_visible_keys // block_size)
        ids.masked_fill_(ids >= num_visible_blocks[:, None], -1)
    return ids


def from_csr(
    offsets: torch.Tensor, indices: torch.Tensor, *, block_size: int, query_block_size: int = 1
) -> BlockIndices:
    """Block ids with a count of their own in each row, as FlashInfer's BSR and dynamic budgets give them.

    offsets: int32 [1 | num_kv_heads | num_q_heads, rows + 1], where each row of each head starts in
    ``indices`` and where the last one ends, which is where the next head's first starts. indices: int32
    [num_ids], ids of blocks inside the row's own sequence, unique in a row, in any order.

    FlashInfer's indptr [rows + 1] is ``offsets[None]``, its R the query block, its C the block of keys.
    """
    _check("offsets", offsets, torch.int32, 2, "[heads, rows + 1]")
    _check("indices", indices, torch.int32, 1, "[num_ids]")
    if 0 in offsets.shape:
        _refuse(
            "INVALID_OFFSETS",
            "offsets",
            f"offsets has shape {list(offsets.shape)}: expected [heads, rows + 1]",
        )
    starts, ends = offsets[:, :-1], offsets[:, 1:]
    counts = ends - starts
    expected_start = F.pad(offsets[:-1, -1], (1, 0))
    _check_offsets(offsets[:, 0] == expected_start, offsets[:, :1], "the end of the head before it, or 0")
    _check_offsets(counts >= 0, ends, "at least the one before it", first_column=1)
    if int(offsets[-1, -1]) != len(indices):
        message = f"offsets ends at {int(offsets[-1, -1])}: expected {len(indices)}, the number of ids"
        _refuse("INVALID_OFFSETS", "offsets", message)
    slot = torch.arange(max(int(counts.amax()) if counts.numel() else 0, 1), device=offsets.device)
    is_used = slot < counts[..., None]
    ids = torch.full(is_used.shape, -1, dtype=torch.int32, device=offsets.device)
    ids[is_used] = indices
    return BlockIndices(ids, block_size, query_block_size)


def from_block_mask(mask: torch.Tensor, *, block_size: int, query_block_size: int) -> BlockIndices:
    """Blocks that are marked, a row for every ``query_block_size`` queries: SeerAttention, XAttention.

    mask: bool [1 | num_kv_heads | num_q_heads, rows, num_blocks], columns are blocks of the row's own
    sequence, from its first; rows of sequences with fewer blocks end in False.
    """
    _check("mask", mask, torch.bool, 3, "[heads, rows, num_blocks]")
    rows_at_once = max(MASK_ENTRIES_AT_ONCE // max(mask.shape[0] * mask.shape[2], 1), 1)
    return BlockIndices(_marked(mask.split(rows_at_once, dim=1)), block_size, query_block_size)


def from_vertical_slash(
    vertical: torch.Tensor,
    slash: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> BlockIndices:
    """Columns that all queries see, and diagonals: MInference's pattern, causal, widened to blocks.

    vertical: int32 [heads, num_columns], keys of a sequence by position; slash: int32 [heads, num_diagonals],
    distances from a query back to the key it sees, 0 for its own; -1 in unused places. heads are 1,
    num_kv_heads or num_q_heads. The same pattern holds for every sequence, as far as its keys reach.

    A token selects every block that holds one of its keys. Blocks are seen whole, up to the token, so it sees
    a superset of the pattern.
    """
    for name, x in (("vertical", vertical), ("slash", slash)):
        _check(name, x, torch.int32, 2, "[heads, entries]")
        bad = (x < -1).nonzero()
        if len(bad):
            head, entry = bad[0].tolist()
            value = int(x[head, entry])
            message = f"{name}[{head}, {entry}] is {value}: expected a key's position or distance, or -1"
            _refuse("INVALID_PATTERN", name, message, head=head, index=entry, value=value)
    if vertical.shape[0] != slash.shape[0]:
        message = f"slash has {slash.shape[0]} heads: expected {vertical.shape[0]}, those of vertical"
        _refuse("INVALID_PATTERN", "slash", message, got=slash.shape[0], expected=vertical.shape[0])
    placed = place_queries(cu_seqlens_q, cu_seqlens_k, int(cu_seqlens_q[-1]), causal=True)
    num_blocks = -(-int(cu_seqlens_k.diff().amax()) // block_size)
    width = num_blocks + vertical.shape[1] + slash.shape[1]
    rows_at_once = max(MASK_ENTRIES_AT_ONCE // max(vertical.shape[0] * width, 1), 1)

    def masks() -> Iterable[torch.Tensor]:
        for position in placed.position.split(rows_at_once):
            key = vertical[:, None].expand(-1, len(position), -1).long()
            diagonal = (position[:, None] - slash[:, None]).where(slash[:, None] >= 0, -1)
            key = torch.cat([key, diagonal], dim=-1)
            is_seen = (key >= 0) & (key <= position[:, None])
            # What is not seen is marked in a column of its own, which is cut off.
            block = (key // block_size).where(is_seen, num_blocks)
            marked = torch.zeros(*key.shape[:2], num_blocks + 1, dtype=torch.bool, device=key.device)
            yield marked.scatter_(-1, block, True)[..., :-1]

    return BlockIndices(_marked(masks()), block_size)


def all_blocks(
    *, block_size: int, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, causal: bool
) -> BlockIndices:
    """Every block: full attention as a pattern, a row for ``block_size`` queries.

    ``dense_attention`` computes the same faster; this is what the sparse kernels make of it. Raises
    ``InputError`` from ``selected_attention`` when a sequence has more blocks than a row may have slots.
    """
    starts = row_starts(cu_seqlens_q, block_size)
    row = torch.arange(int(starts[-1]), device=starts.device)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    num_keys, num_queries = (x.long().diff()[sequence] for x in (cu_seqlens_k, cu_seqlens_q))
    num_visible = num_keys
    if causal:
        end_of_row = torch.minimum((row - starts[sequence] + 1) * block_size, num_queries)
        num_visible = (num_keys - num_queries + end_of_row).clamp(min=0)
    num_visible_blocks = -(-num_visible // block_size)
    block = torch.arange(max(int(num_visible_blocks.amax()) if len(row) else 0, 1), device=starts.device)
    ids = block.where(block < num_visible_blocks[:, None], -1)
    return BlockIndices(ids[None].int(), block_size, block_size)


def _marked(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """int32 [heads, rows, slots]: the marked columns of bool [heads, some rows, num_blocks], then -1.

    As many slots as the fullest row needs, at least one.
    """
    parts = []
    for mask in masks:
        slots = max(int(mask.sum(-1).amax()) if mask.numel() else 0, 1)
        # In a row, the place of a marked column is how many are marked before it.
        head, row, block = mask.nonzero(as_tuple=True)
        place = (mask.cumsum(-1, dtype=torch.int32) - 1)[head, row, block].long()
        ids = torch.full((*mask.shape[:2], slots), -1, dtype=torch.int32, device=mask.device)
        ids[head, row, place] = block.int()
        parts.append(ids)
    slots = max(ids.shape[-1] for ids in parts)
    return torch.cat([F.pad(ids, (0, slots - ids.shape[-1]), value=-1) for ids in parts], dim=1)


def _check_offsets(
    is_right: torch.Tensor, values: torch.Tensor, expected: str, *, first_column: int = 0
) -> None:
    """Refuse the first of ``values`` [heads, columns], which start in ``first_column``, that is not right."""
    bad = (~is_right.view_as(values)).nonzero()
    if len(bad):
        head, column = bad[0].tolist()
        value, row = int(values[head, column]), column + first_column
        message = f"offsets[{head}, {row}] is {value}: expected {expected}"
        _refuse("INVALID_OFFSETS", "offsets", message, head=head, index=row, value=value, expected=expected)


def _check(name: str, x: torch.Tensor, dtype: torch.dtype, rank: int, layout: str) -> None:
    if x.dtype != dtype:
        got, expected = (str(d).removeprefix("torch.") for d in (x.dtype, dtype))
        message = f"{name} has dtype {got}: expected {expected}"
        _refuse("INVALID_DTYPE", name, message, got=got, expected=expected)
    if x.dim() != rank:
        expected = f"{rank}, {layout}"
        message = f"{name} has rank {x.dim()} (shape {list(x.shape)}): expected {expected}"
        _refuse("INVALID_RANK", name, message, got=x.dim(), expected=expected)


def _refuse(reason: str, field: str, message: str, **facts: object) -> NoReturn:
    raise InputError(reason, field, message, **facts)

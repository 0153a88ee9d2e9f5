"""The values of block_indices: in range, causal, unique in a row; the first offender is named.

The check runs beside the receipt of a request, so on the CPU it is numpy on chunks that fit the cache: one
thread, near the speed of memory, where torch would wake all threads for every small step. Rows that all
ascend and then end are not sorted, on any device; on a GPU a kernel has mostly accepted those before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsa_core.errors import InputError
from fsa_core.packing import row_starts

CPU_IDS_AT_ONCE = 2**17
CUDA_IDS_AT_ONCE = 2**22
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class IndexRows:
    """What each row of block_indices belongs to, each [num_rows].

    ``first_token`` is the row's first packed query, ``num_blocks`` (int32) those of its sequence, and
    ``num_allowed`` (int32) how many of them, from the first, its last query may see.
    """

    sequence: torch.Tensor
    first_token: torch.Tensor
    num_blocks: torch.Tensor
    num_allowed: torch.Tensor

    @classmethod
    def of(
        cls,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        num_rows: int,
        *,
        block_size: int,
        query_block_size: int,
        causal: bool,
    ) -> "IndexRows":
        starts = row_starts(cu_seqlens_q, query_block_size)
        row = torch.arange(num_rows, device=starts.device)
        sequence = torch.searchsorted(starts[1:], row, right=True).clamp_(max=len(starts) - 2)
        start, end = cu_seqlens_q.long()[:-1][sequence], cu_seqlens_q.long()[1:][sequence]
        first_token = start + (row - starts[sequence]) * query_block_size
        num_keys = cu_seqlens_k.long().diff()[sequence]
        num_blocks = -(-num_keys // block_size)
        num_allowed = num_blocks
        if causal:
            last_token = torch.minimum(first_token + query_block_size, end) - 1
            position = num_keys - (end - last_token)
            num_allowed = torch.minimum(position // block_size + 1, num_blocks).clamp_(min=0)
        return cls(sequence, first_token, num_blocks.int(), num_allowed.int())


def ids_are_valid(block_indices: torch.Tensor, rows: IndexRows, others: torch.Tensor) -> bool:
    """Whether every id of ``block_indices`` [heads, num_rows, num_slots] is in range, causal and unique.

    False too if ``others``, bool [], the verdict of cheaper checks, is. On CUDA all is read together, in one
    synchronisation if rows ascend, and two if they do not.
    """
    if block_indices.is_cuda:
        return _are_valid_on_cuda(block_indices, rows.num_allowed, others)
    return bool(others) and _are_valid_on_cpu(block_indices.numpy(), rows.num_allowed.numpy())


def first_offender(
    block_indices: torch.Tensor, rows: IndexRows, *, block_size: int, per_token: bool
) -> InputError:
    """The error that names the first bad id by head, then token, then slot.

    Of several faults of one id the order is: out of range, not causal, duplicate (of an earlier slot).
    """
    for head, first_row, ids, part in _parts(block_indices, rows):
        bad = ~_in_range(ids, part.num_allowed)
        bad |= _repeats(ids)
        if bad.any():
            row, slot = divmod(int(bad.flatten().int().argmax()), ids.shape[1])
            who = f"{'token' if per_token else 'row'} {first_row + row}"
            place = f"block_indices[head {head}, {who}, slot {slot}] is {int(ids[row, slot])}"
            at = (place, ids[row].tolist(), slot, head, first_row + row, rows)
            options: dict[str, Any] = {"block_size": block_size, "per_token": per_token}
            return offence(*at, field="block_indices", slot=slot, **options)
    raise AssertionError("every id is valid")


def _parts(
    block_indices: torch.Tensor, rows: IndexRows
) -> Iterator[tuple[int, int, torch.Tensor, IndexRows]]:
    """(head, first row, ids [n, num_slots], their rows), in order."""
    _, num_rows, num_slots = block_indices.shape
    size = max((CUDA_IDS_AT_ONCE if block_indices.is_cuda else CPU_IDS_AT_ONCE) // num_slots, 1)
    for head, ids in enumerate(block_indices):
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            facts = (rows.sequence, rows.first_token, rows.num_blocks, rows.num_allowed)
            yield head, start, ids[part], IndexRows(*(fact[part] for fact in facts))


def _are_valid_on_cuda(block_indices: torch.Tensor, num_allowed: torch.Tensor, others: torch.Tensor) -> bool:
    heads, num_rows, num_slots = block_indices.shape
    size = max(CUDA_IDS_AT_ONCE // max(heads * num_slots, 1), 1)
    parts = [slice(start, start + size) for start in range(0, num_rows, size)]
    in_range, ascend = others, torch.ones_like(others)
    for part in parts:
        ids = block_indices[:, part]
        in_range = in_range & _in_range(ids, num_allowed[part]).all()
        ascend &= _ascend(ids).all()
    all_in_range, all_ascend = torch.stack((in_range, ascend)).tolist()
    # Reading that costs microseconds, sorting what ascends milliseconds.
    if not all_in_range or all_ascend:
        return bool(all_in_range)
    return not torch.stack([_repeats(block_indices[:, part]).any() for part in parts]).any()


def _ascend(ids: torch.Tensor) -> torch.Tensor:
    """bool [..., num_slots - 1], from the second slot on: larger than the slot before, or unused."""
    # Cleared of its sign an unused slot is the largest id.
    as_last = ids & _INT32_MAX
    return (as_last[..., 1:] > as_last[..., :-1]) | (ids[..., 1:] < 0)


def _are_valid_on_cpu(block_indices: NDArray[np.int32], num_allowed: NDArray[np.int32]) -> bool:
    heads, num_rows, num_slots = block_indices.shape
    size = max(CPU_IDS_AT_ONCE // num_slots, 1)
    for start in range(0, num_rows, size):
        limit = num_allowed[start : start + size].repeat(num_slots)
        for head in range(heads):
            if not _chunk_is_valid(block_indices[head, start : start + size], limit):
                return False
    return True


def _chunk_is_valid(ids: NDArray[np.int32], limit: NDArray[np.int32]) -> bool:
    """ids: [rows, num_slots]; limit: [rows * num_slots]. Flat, because rows are too short to loop over."""
    flat = ids.reshape(-1)
    if flat.size == 0:
        return True
    if flat.min() < -1 or not (flat < limit).all():
        return False
    # Cleared of its sign an unused slot is the largest id: this passes rows that ascend and then end.
    as_last = flat & _INT32_MAX
    ascends = flat < 0
    ascends[1:] |= as_last[1:] > as_last[:-1]
    ascends.reshape(ids.shape)[:, 0] = True
    if ascends.all():
        return True
    # Sorting all rows of the chunk costs less than picking out those that need it.
    ordered = np.sort(ids, axis=1).reshape(-1)
    repeats = ordered >= 0
    repeats[1:] &= ordered[1:] == ordered[:-1]
    repeats.reshape(ids.shape)[:, 0] = False
    return not repeats.any()


def _in_range(ids: torch.Tensor, num_allowed: torch.Tensor) -> torch.Tensor:
    return (ids >= -1) & (ids < num_allowed[:, None])


def _repeats(ids: torch.Tensor) -> torch.Tensor:
    """bool like ids: the id stands in an earlier slot of its row already."""
    values, slot = ids.sort(dim=-1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    same = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] >= 0)
    return repeated.scatter_(-1, slot[..., 1:], same)


def offence(
    place: str,
    row_ids: list[int],
    number: int,
    head: int,
    row: int,
    rows: IndexRows,
    *,
    block_size: int,
    per_token: bool,
    field: str,
    **where: object,
) -> InputError:
    """What is wrong with ``row_ids[number]``, of the ids of ``row``; ``place`` says where and what it is.

    ``where`` goes into the metadata beside what every offence has.
    """
    value, sequence = row_ids[number], int(rows.sequence[row])
    num_blocks, num_allowed = int(rows.num_blocks[row]), int(rows.num_allowed[row])
    who = "token" if per_token else "row"
    if value < -1 or value >= num_blocks:
        reason = "INDEX_OUT_OF_RANGE"
        expected = f"0 to {num_blocks - 1}, or -1" if num_blocks else "-1"
        why = f"sequence {sequence} has {num_blocks} blocks of {block_size} keys, so expected {expected}"
    elif value >= num_allowed:
        reason = "INDEX_NOT_CAUSAL"
        expected = f"at most {num_allowed - 1}" if num_allowed else "-1"
        own = (
            f"the {who}'s own block is {num_allowed - 1}"
            if num_allowed
            else f"the {who} comes before all keys"
        )
        why = f"{own}, so under causal expected {expected}"
    else:
        reason = "INDEX_DUPLICATE"
        expected = "an id that no earlier slot has"
        why = f"slot {row_ids.index(value)} has it already; ids must be unique in a row"
    return InputError(
        reason,
        field,
        f"{place}: {why}",
        head=head,
        token=int(rows.first_token[row]),
        row=row,
        value=value,
        sequence=sequence,
        expected=expected,
        **where,
    )

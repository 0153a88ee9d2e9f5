"""Block ids with a count of their own in each row: FlashInfer's BSR, dynamic budgets, top-p selection."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fsa_core.compact import (
    CompactPattern,
    check_heads,
    check_rows,
    check_slots,
    check_tensor,
    fill_rows,
    refuse,
)
from fsa_core.errors import InputError
from fsa_core.index_checks import CPU_IDS_AT_ONCE, IndexRows, offence
from fsa_core.problem import Problem

# Cleared of its sign an unused slot, -1, is the largest id.
_UNUSED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class BlockCsr(CompactPattern):
    """offsets: int32 [1 | num_kv_heads | num_q_heads, rows + 1], where each row of each head starts in
    ``indices`` and where the last one ends, which is where the next head's first starts. indices: int32
    [num_ids], ids of blocks inside the row's own sequence, unique in a row, in any order; -1 is passed over.

    FlashInfer's indptr [rows + 1] is ``offsets[None]``, its R the query block, its C the block of keys.
    """

    offsets: torch.Tensor
    indices: torch.Tensor
    block_size: int
    query_block_size: int = 1

    def check(
        self, problem: Problem, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
    ) -> tuple[int, int]:
        self.check_offsets()
        heads, num_rows = self.offsets.shape[0], self.offsets.shape[1] - 1
        check_heads("offsets", heads, problem)
        check_rows("offsets", num_rows, cu_seqlens_q, self.query_block_size)
        check_slots("offsets", self.num_slots)
        rows = IndexRows.of(
            cu_seqlens_q,
            cu_seqlens_k,
            num_rows,
            block_size=self.block_size,
            query_block_size=self.query_block_size,
            causal=problem.causal,
        )
        for head, offsets in enumerate(self.offsets.numpy()):
            position = _first_bad(self.indices.numpy(), offsets, rows.num_allowed.numpy())
            if position is not None:
                raise self._offence(head, position, rows)
        return heads, self.num_slots

    def check_offsets(self) -> None:
        check_tensor("offsets", self.offsets, torch.int32, 2, "[heads, rows + 1]")
        check_tensor("indices", self.indices, torch.int32, 1, "[num_ids]")
        if 0 in self.offsets.shape:
            layout = "[heads, rows + 1]"
            message = f"offsets has shape {list(self.offsets.shape)}: expected {layout}"
            refuse("INVALID_OFFSETS", "offsets", message, list(self.offsets.shape), layout)
        end_before = F.pad(self.offsets[:-1, -1:], (0, 0, 1, 0))
        # Compared, not subtracted: differences of integers that a client chose may overflow.
        ascends = self.offsets[:, 1:] >= self.offsets[:, :-1]
        bad = (~torch.cat([self.offsets[:, :1] == end_before, ascends], dim=1)).nonzero()
        if len(bad):
            head, index = bad[0].tolist()
            value = int(self.offsets[head, index])
            expected = "at least the one before it" if index else "the end of the head before it, or 0"
            message = f"offsets[head {head}, {index}] is {value}: expected {expected}"
            where = {"head": head, "index": index, "value": value}
            refuse("INVALID_OFFSETS", "offsets", message, value, expected, **where)
        end = int(self.offsets[-1, -1])
        if end != len(self.indices):
            expected = f"{len(self.indices)}, the number of ids"
            refuse("INVALID_OFFSETS", "offsets", f"offsets ends at {end}: expected {expected}", end, expected)

    @property
    def num_slots(self) -> int:
        """The ids of the fullest row, at least 1."""
        counts = self.offsets.diff()
        return max(int(counts.amax()), 1) if counts.numel() else 1

    def write_rows(
        self,
        ids: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
    ) -> None:
        counts = self.offsets.diff()
        if bool((counts == ids.shape[2]).all()):
            ids.copy_(self.indices.view(ids.shape))
            return
        for rows, num_ids, offsets in zip(ids, counts, self.offsets, strict=True):
            fill_rows(rows, num_ids, self.indices[int(offsets[0]) : int(offsets[-1])])

    def _offence(self, head: int, position: int, rows: IndexRows) -> InputError:
        offsets = self.offsets[head]
        row = int(torch.searchsorted(offsets, position, right=True)) - 1
        start, end = (int(offset) for offset in offsets[row : row + 2])
        row_ids, slot = self.indices[start:end].tolist(), position - start
        per_token = self.query_block_size == 1
        who = f"{'token' if per_token else 'row'} {row}"
        return offence(
            f"indices[{position}] (head {head}, {who}, slot {slot}) is {row_ids[slot]}",
            row_ids,
            slot,
            head,
            row,
            rows,
            block_size=self.block_size,
            per_token=per_token,
            field="indices",
            slot=slot,
            index=position,
        )


def _first_bad(
    indices: NDArray[np.int32], offsets: NDArray[np.int32], num_allowed: NDArray[np.int32]
) -> int | None:
    """The place in ``indices`` of the first id of one head's rows that is out of range or there already.

    offsets: [rows + 1]; num_allowed: [rows]. Numpy on chunks of whole rows, as in index_checks.
    """
    first = 0
    while first < len(num_allowed):
        end = int(offsets.searchsorted(offsets[first] + CPU_IDS_AT_ONCE, side="right")) - 1
        end = max(end, first + 1)
        ids = indices[offsets[first] : offsets[end]]
        bad = _bad_in_chunk(ids, offsets[first : end + 1] - offsets[first], num_allowed[first:end])
        if bad is not None:
            return int(offsets[first]) + bad
        first = end
    return None


def _bad_in_chunk(
    ids: NDArray[np.int32], offsets: NDArray[np.int32], num_allowed: NDArray[np.int32]
) -> int | None:
    if not len(ids):
        return None
    counts = np.diff(offsets)
    in_range = ids < num_allowed.repeat(counts)
    in_range &= ids >= -1
    as_last = ids & _UNUSED
    ascends = ids < 0
    ascends[1:] |= as_last[1:] > as_last[:-1]
    ascends[offsets[:-1][counts > 0]] = True
    if in_range.all() and ascends.all():
        return None
    # Rows and ids in one integer that sorts fast; ids out of range are found by their range.
    width = int(num_allowed.max())
    dtype: type[np.signedinteger[Any]] = np.int32 if len(counts) * width < 2**31 else np.int64
    key: NDArray[Any] = (np.arange(len(counts), dtype=dtype) * dtype(width)).repeat(counts)
    key += ids
    key[~in_range | (ids < 0)] = -1
    if in_range.all() and not _repeats(np.sort(key)).any():
        return None
    order = key.argsort(kind="stable")
    is_bad = ~in_range
    is_bad[order[1:][_repeats(key[order])]] = True
    return int(is_bad.argmax())


def _repeats(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the keys but the first is the one before it; -1 never is."""
    is_repeated: NDArray[np.bool_] = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    return is_repeated

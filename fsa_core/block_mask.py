"""Blocks that are marked, a row for some queries: SeerAttention, XAttention."""

from dataclasses import dataclass

import torch

from fsa_core.compact import (
    CompactPattern,
    check_count,
    check_heads,
    check_rows,
    check_slots,
    check_tensor,
    fill_rows,
)
from fsa_core.errors import InputError
from fsa_core.index_checks import IndexRows, offence
from fsa_core.problem import Problem

# Entries that are looked at together; each costs some 30 bytes on the way.
ENTRIES_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class BlockMask(CompactPattern):
    """mask: bool [1 | num_kv_heads | num_q_heads, rows, num_blocks], a row for ``query_block_size`` queries.

    Columns are blocks of the row's own sequence, from its first, as many as the longest sequence has; rows
    of sequences with fewer end in False.
    """

    mask: torch.Tensor
    block_size: int
    query_block_size: int

    def check(
        self, problem: Problem, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
    ) -> tuple[int, int]:
        self.check_mask()
        heads, num_rows, num_blocks = self.mask.shape
        check_heads("mask", heads, problem)
        check_rows("mask", num_rows, cu_seqlens_q, self.query_block_size)
        expected = -(-int(cu_seqlens_k.diff().amax()) // self.block_size)
        check_count("mask", "block count", num_blocks, expected, "the blocks of the longest sequence")
        num_slots = self.num_slots
        check_slots("mask", num_slots)
        self._check_marks(cu_seqlens_q, cu_seqlens_k, causal=problem.causal)
        return heads, num_slots

    def check_mask(self) -> None:
        check_tensor("mask", self.mask, torch.bool, 3, "[heads, rows, num_blocks]")

    @property
    def num_slots(self) -> int:
        """The marks of the fullest row, at least 1."""
        counts = [int(mask.sum(-1, dtype=torch.int32).amax()) for mask in self._parts() if mask.numel()]
        return max([1, *counts])

    def write_rows(
        self,
        ids: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
    ) -> None:
        num_blocks = max(self.mask.shape[2], 1)
        for mask, rows in zip(self._parts(), ids.split(self._rows_at_once, dim=1), strict=True):
            block = mask.reshape(-1).nonzero()[:, 0].remainder_(num_blocks).int()
            fill_rows(rows, mask.sum(-1, dtype=torch.int32), block)

    @property
    def _rows_at_once(self) -> int:
        return max(ENTRIES_AT_ONCE // max(self.mask.shape[0] * self.mask.shape[2], 1), 1)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = self.mask.split(self._rows_at_once, dim=1)
        return parts

    def _check_marks(self, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, *, causal: bool) -> None:
        options = {"block_size": self.block_size, "query_block_size": self.query_block_size}
        rows = IndexRows.of(cu_seqlens_q, cu_seqlens_k, self.mask.shape[1], causal=causal, **options)
        block = torch.arange(self.mask.shape[2], device=self.mask.device)
        num_allowed = rows.num_allowed.split(self._rows_at_once)
        for head, whole in enumerate(self.mask):
            for part, (mask, allowed) in enumerate(
                zip(whole.split(self._rows_at_once), num_allowed, strict=True)
            ):
                bad = mask & (block >= allowed[:, None])
                if bad.any():
                    row, value = bad.nonzero()[0].tolist()
                    raise self._offence(head, row + part * self._rows_at_once, value, rows)

    def _offence(self, head: int, row: int, block: int, rows: IndexRows) -> InputError:
        marked = self.mask[head, row].nonzero()[:, 0].tolist()
        per_token = self.query_block_size == 1
        return offence(
            f"mask[head {head}, {'token' if per_token else 'row'} {row}, block {block}] is set",
            marked,
            marked.index(block),
            head,
            row,
            rows,
            block_size=self.block_size,
            per_token=per_token,
            field="mask",
            index=block,
        )

"""Columns that all queries see, and diagonals: MInference's pattern, causal, widened to whole blocks."""

from dataclasses import dataclass

import torch

from fsa_core.compact import CompactPattern, check_count, check_heads, check_slots, check_tensor, refuse
from fsa_core.packing import place_queries
from fsa_core.problem import Problem

# Entries of a chunk of rows; each costs some 30 bytes on the way. 2**18 were fastest on 2 CPU cores.
ENTRIES_AT_ONCE = 2**18

_NEVER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class VerticalSlash(CompactPattern):
    """vertical: int32 [heads, columns], keys of a sequence by position; slash: int32 [heads, diagonals],
    distances from a query back to the key it sees, 0 for its own; -1 in unused places, any order.

    heads are 1, num_kv_heads or num_q_heads. The same pattern holds for every sequence, as far as its keys
    reach. A token selects every block that holds one of its keys. Blocks are seen whole, up to the token, so
    it sees a superset of the pattern.
    """

    vertical: torch.Tensor
    slash: torch.Tensor
    block_size: int

    def check(
        self, problem: Problem, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
    ) -> tuple[int, int]:
        self.check_entries()
        check_heads("vertical", len(self.vertical), problem)
        if not problem.causal:
            message = "causal is false: expected true, as a vertical-slash pattern looks back only"
            refuse("INVALID_PATTERN", "causal", message, False, True)
        slots = _Marks.of(self, _longest(cu_seqlens_k)).num_slots
        check_slots("vertical_slash", slots)
        return len(self.vertical), slots

    def check_entries(self) -> None:
        for name, x in (("vertical", self.vertical), ("slash", self.slash)):
            check_tensor(name, x, torch.int32, 2, "[heads, entries]")
            bad = (x < -1).nonzero()
            if len(bad):
                head, entry = bad[0].tolist()
                value, expected = int(x[head, entry]), "a key's position or distance, or -1"
                message = f"{name}[head {head}, entry {entry}] is {value}: expected {expected}"
                refuse("INVALID_PATTERN", name, message, value, expected, head=head, index=entry, value=value)
        check_count("slash", "head count", len(self.slash), len(self.vertical), "that of vertical")

    def num_slots(self, cu_seqlens_k: torch.Tensor) -> int:
        """No row selects more: distinct blocks of columns and distinct diagonals, or all blocks."""
        return _Marks.of(self, _longest(cu_seqlens_k)).num_slots

    def write_rows(self, ids: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
        marks = _Marks.of(self, _longest(cu_seqlens_k))
        position = place_queries(cu_seqlens_q, cu_seqlens_k, ids.shape[1], causal=True).position
        rows_at_once = max(ENTRIES_AT_ONCE // marks.num_candidates, 1)
        for head, target in enumerate(ids):
            for rows, part in zip(target.split(rows_at_once), position.split(rows_at_once), strict=True):
                marks.write(head, part, rows)


@dataclass(frozen=True, slots=True)
class _Marks:
    """What the pattern marks, in whole blocks: all int32 [heads, ...], _NEVER in unused places.

    ``columns``: blocks with a column, ascending. ``first_column`` [heads, num_blocks + 1]: the first in a
    block. A query at place r of its block a sees a diagonal's key in block a - e or a - e - 1, as r reaches
    back over its block's start. ``back``: each such e. Block a - e is seen from place ``from_place`` on, and
    before ``to_place``.
    """

    block_size: int
    columns: torch.Tensor
    first_column: torch.Tensor
    back: torch.Tensor
    from_place: torch.Tensor
    to_place: torch.Tensor
    num_slots: int

    @classmethod
    def of(cls, pattern: VerticalSlash, longest: int) -> "_Marks":
        size = pattern.block_size
        num_blocks = -(-longest // size)
        # One block more, without columns, so that there always is one.
        first_column = _extreme(pattern.vertical, pattern.vertical, longest, size, num_blocks + 1, "amin")
        columns = _ascending(first_column < _NEVER)
        place = pattern.slash.remainder(size)
        nearest = _extreme(pattern.slash, place, longest, size, num_blocks + 1, "amin")
        farthest = _extreme(pattern.slash, place, longest, size, num_blocks + 1, "amax")
        # Those with distances in block e - 1 of them reach back to block a - e before their own place.
        to_place = farthest.roll(1, dims=1)
        back = _ascending((nearest < _NEVER) | (to_place > 0))
        at = back.long().clamp(max=num_blocks)
        distance = pattern.slash.where(pattern.slash < longest, -1).sort(dim=1).values
        is_new = torch.ones_like(distance, dtype=torch.bool)
        is_new[:, 1:] = distance[:, 1:] != distance[:, :-1]
        num_diagonals = (is_new & (distance >= 0)).sum(1).minimum((back < _NEVER).sum(1))
        most = (columns < _NEVER).sum(1) + num_diagonals
        return cls(
            size,
            columns,
            first_column,
            back,
            nearest.gather(1, at),
            to_place.gather(1, at),
            num_slots=max(min(int(most.amax()) if len(most) else 0, num_blocks), 1),
        )

    @property
    def num_candidates(self) -> int:
        return self.columns.shape[1] + self.back.shape[1]

    def write(self, head: int, position: torch.Tensor, ids: torch.Tensor) -> None:
        """Fill int32 ``ids`` [rows, slots] of queries at ``position`` [rows]: ascending, then -1."""
        # Queries before the first key see as little as the one just before it.
        position = position.int().clamp(min=-1)
        block = position.div(self.block_size, rounding_mode="floor")
        # Within a block of a sequence, rows differ only from places on where a diagonal or a column begins
        # or ends.
        changes = torch.zeros(self.block_size + 1, dtype=torch.bool, device=ids.device)
        for places in (self.from_place[head], self.to_place[head]):
            changes[places.clamp(0, self.block_size).long()] = True
        is_first = changes[position - block * self.block_size]
        is_first |= self.first_column[head][block.clamp(min=0)] == position
        is_first[1:] |= (block[1:] != block[:-1]) | (position[1:] != position[:-1] + 1)
        is_first[:1] = True
        chosen = self._rows(head, position[is_first, None], block[is_first, None])
        torch.index_select(chosen[:, : ids.shape[1]], 0, is_first.cumsum(0) - 1, out=ids)

    def _rows(self, head: int, position: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """int32 [rows, num_candidates] of queries at ``position`` [rows, 1], in ``block`` [rows, 1]."""
        place = position - block * self.block_size
        diagonal = block - self.back[head]
        is_seen = (self.from_place[head] <= place) | (self.to_place[head] > place)
        is_seen &= diagonal >= 0
        # Not again what a column selects.
        is_seen &= self.first_column[head][diagonal.clamp(min=0)] > position
        column = self.columns[head]
        is_reached = self.first_column[head][column.clamp(max=self.first_column.shape[1] - 1)] <= position
        chosen = torch.cat([column.where(is_reached, _NEVER), diagonal.where(is_seen, _NEVER)], dim=1)
        chosen = _sorted(chosen)
        return chosen.masked_fill_(chosen == _NEVER, -1)


def _extreme(
    keys: torch.Tensor, values: torch.Tensor, longest: int, block_size: int, width: int, reduce: str
) -> torch.Tensor:
    """int32 [heads, width]: of each block of ``keys`` below ``longest`` the smallest (amin) or largest value.

    Where a block has none: _NEVER, or -1.
    """
    block = (keys // block_size).where((keys >= 0) & (keys < longest), width).long()
    found = keys.new_full((len(keys), width + 1), _NEVER if reduce == "amin" else -1)
    return found.scatter_reduce_(1, block, values, reduce)[:, :-1]


def _ascending(is_marked: torch.Tensor) -> torch.Tensor:
    """int32 [heads, most, at least 1]: the marked columns of bool [heads, columns], then _NEVER."""
    column = torch.arange(is_marked.shape[1], dtype=torch.int32, device=is_marked.device)
    most = max(int(is_marked.sum(1).amax()), 1) if len(is_marked) else 1
    return column.where(is_marked, _NEVER).sort(dim=1).values[:, :most]


def _sorted(ids: torch.Tensor) -> torch.Tensor:
    if not ids.is_cuda:
        # In place, and without the permutation that torch makes beside it.
        ids.numpy().sort(axis=1)
        return ids
    return ids.sort(dim=1).values


def _longest(cu_seqlens: torch.Tensor) -> int:
    return int(cu_seqlens.diff().amax())

"""Patterns as other systems send them: checked in the form they come in, written out where there is room.

A few bytes of such a pattern can stand for gigabytes of block indices, so a server checks it, and knows how
much room its normal form takes, before it makes that room.
"""

from abc import ABC, abstractmethod
from typing import NoReturn

import torch

from fsa_core.errors import InputError
from fsa_core.packing import row_starts
from fsa_core.problem import MAX_SLOTS, Problem


class CompactPattern(ABC):
    """Which blocks each query token selects, in fewer bytes than block indices."""

    block_size: int
    query_block_size: int = 1

    @abstractmethod
    def check(
        self, problem: Problem, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
    ) -> tuple[int, int]:
        """Index heads, and slots that no row of the normal form exceeds. On the CPU.

        ``problem`` is the call without its pattern. Raises InputError, naming field and place. Takes memory
        and time that grow with the pattern's own bytes and its sequences, not with what it stands for.
        """

    @abstractmethod
    def write_rows(self, ids: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
        """Fill int32 ``ids`` [index heads, rows, slots], a row for ``query_block_size`` queries."""


def fill_rows(rows: torch.Tensor, counts: torch.Tensor, ids: torch.Tensor) -> None:
    """Deal int32 ``ids``, in order, to ``rows`` [..., slots]: ``counts`` [...] to each, and -1 after them."""
    slot = torch.arange(rows.shape[-1], device=rows.device)
    rows.fill_(-1)
    rows.masked_scatter_(slot < counts[..., None], ids)


def check_tensor(name: str, x: object, dtype: torch.dtype, rank: int, layout: str) -> None:
    if not isinstance(x, torch.Tensor):
        got, expected = type(x).__name__, "torch.Tensor"
        refuse("INVALID_TYPE", name, f"{name} has type {got}: expected {expected}", got, expected)
    if x.dtype != dtype:
        got, expected = (str(d).removeprefix("torch.") for d in (x.dtype, dtype))
        refuse("INVALID_DTYPE", name, f"{name} has dtype {got}: expected {expected}", got, expected)
    if x.dim() != rank:
        expected = f"{rank}, {layout}"
        message = f"{name} has rank {x.dim()} (shape {list(x.shape)}): expected {expected}"
        refuse("INVALID_RANK", name, message, x.dim(), expected)


def check_heads(name: str, heads: int, problem: Problem) -> None:
    allowed = sorted({1, problem.num_kv_heads, problem.num_q_heads})
    if heads not in allowed:
        expected = f"{' or '.join(map(str, allowed))} (1, the heads of k, or those of q)"
        message = f"{name} has head count {heads}: expected {expected}"
        refuse("INVALID_INDEX_SHAPE", name, message, heads, expected)


def check_count(name: str, what: str, count: int, expected: int, why: str) -> None:
    if count != expected:
        text = f"{expected}, {why}"
        refuse("INVALID_INDEX_SHAPE", name, f"{name} has {what} {count}: expected {text}", count, text)


def check_rows(name: str, rows: int, cu_seqlens_q: torch.Tensor, query_block_size: int) -> None:
    expected = int(row_starts(cu_seqlens_q, query_block_size)[-1])
    shared = f"one for {query_block_size} queries of a sequence"
    check_count(name, "row count", rows, expected, "one a query token" if query_block_size == 1 else shared)


def check_slots(name: str, slots: int) -> None:
    """The blocks that the fullest row of ``name`` selects."""
    if slots > MAX_SLOTS:
        message = f"{name} selects {slots} blocks in a row: expected at most {MAX_SLOTS}"
        refuse("INVALID_INDEX_SHAPE", name, message, slots, f"at most {MAX_SLOTS}")


def refuse(reason: str, field: str, message: str, got: object, expected: object, **where: object) -> NoReturn:
    raise InputError(reason, field, message, got=got, expected=expected, **where)

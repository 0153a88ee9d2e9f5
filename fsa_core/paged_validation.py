"""The contract of attention over a paged cache, checked where data enters.

Reasons are those of fsa_core.validation, INVALID_PAGE_SIZE, INVALID_PAGE_TABLE, INVALID_SEQ_LENS and
PAGE_OUT_OF_RANGE. The order is from the outside in; of the values first the lengths, then the pages that they
need, then the ids of blocks that those hold.
"""

from typing import NoReturn

import torch

from fsa_core.errors import InputError, refuse, refuse_bad_starts
from fsa_core.index_checks import IndexRows, first_offender, ids_are_valid
from fsa_core.packing import starts_of
from fsa_core.problem import BLOCK_SIZES, Problem
from fsa_core.validation import (
    check_index_shape,
    check_ints,
    check_operands,
    check_row_count,
    check_tensor,
    checked_choice,
    checked_scale,
    starts_are_valid,
)

CACHE_LAYOUT = "[num_pages, page_size, heads, dim]"


def validate_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor | None,
    softmax_scale: float | None,
    check_values: bool,
) -> Problem:
    """The sizes of a call, its keys being all that the cache has room for, or InputError.

    Arguments as in ``fsa_core.decode``. ``check_values=False`` leaves the contents of page_table, seq_lens,
    cu_seqlens_q and block_indices unread. Reading them, when they are valid, costs one synchronisation on
    CUDA if rows ascend, and two if they do not.
    """
    _check_caches(q, k_cache, v_cache)
    block_size = checked_choice("block_size", block_size, BLOCK_SIZES)
    page_size = k_cache.shape[1]
    if page_size % block_size:
        refuse("INVALID_PAGE_SIZE", "k_cache", "page size", page_size, f"a multiple of {block_size}")
    scale = checked_scale(softmax_scale, q.shape[2])
    _check_sequences(q, page_table, seq_lens, cu_seqlens_q)
    check_index_shape(q, k_cache[:, 0], block_indices)
    check_row_count(block_indices, q.shape[0], "one a query token")
    if check_values:
        tensors = (page_table, block_indices, seq_lens, cu_seqlens_q)
        _check_values(*tensors, block_size=block_size, page_size=page_size, num_pages=k_cache.shape[0])
    return Problem(
        num_q_tokens=q.shape[0],
        num_k_tokens=k_cache.shape[0] * page_size,
        num_sequences=seq_lens.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        value_dim=v_cache.shape[3],
        dtype=q.dtype,
        index_heads=block_indices.shape[0],
        num_slots=block_indices.shape[2],
        block_size=block_size,
        causal=True,
        softmax_scale=scale,
    )


def _check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, CACHE_LAYOUT, 4)
    if v_cache.shape[:2] != k_cache.shape[:2]:
        got, expected = list(v_cache.shape[:2]), list(k_cache.shape[:2])
        refuse("INVALID_TOKENS", "v_cache", "pages and page size", got, f"{expected}, those of k_cache")
    for what, size in zip(("page count", "page size"), k_cache.shape, strict=False):
        if size == 0:
            refuse("INVALID_PAGE_SIZE", "k_cache", what, size, "at least 1")
    check_operands(q, k_cache[:, 0], v_cache[:, 0], k_name="k_cache", v_name="v_cache")


def _check_sequences(
    q: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None
) -> None:
    """That all three speak of as many sequences; their contents are not read."""
    check_ints("page_table", page_table, "[num_sequences, max_pages]", 2, q.device)
    check_ints("seq_lens", seq_lens, "[num_sequences]", 1, q.device)
    num_sequences = seq_lens.shape[0]
    if page_table.shape[0] != num_sequences:
        expected = f"{num_sequences}, one for each of seq_lens"
        refuse("INVALID_PAGE_TABLE", "page_table", "row count", page_table.shape[0], expected)
    if page_table.shape[1] == 0:
        refuse("INVALID_PAGE_TABLE", "page_table", "column count", 0, "at least 1")
    if cu_seqlens_q is None:
        if num_sequences != q.shape[0]:
            expected = f"{q.shape[0]}, one for each token of q, since there are no cu_seqlens_q"
            refuse("INVALID_SEQ_LENS", "seq_lens", "length", num_sequences, expected)
        return
    check_ints("cu_seqlens_q", cu_seqlens_q, "[num_sequences + 1]", 1, q.device)
    if cu_seqlens_q.shape[0] != num_sequences + 1:
        expected = f"{num_sequences + 1}, one more than seq_lens"
        refuse("INVALID_CU_SEQLENS", "cu_seqlens_q", "length", cu_seqlens_q.shape[0], expected)


def _check_values(
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    *,
    block_size: int,
    page_size: int,
    num_pages: int,
) -> None:
    num_tokens, max_pages = block_indices.shape[1], page_table.shape[1]
    starts = torch.arange(num_tokens + 1, device=seq_lens.device) if cu_seqlens_q is None else cu_seqlens_q
    rows = IndexRows.of(
        starts, starts_of(seq_lens), num_tokens, block_size=block_size, query_block_size=1, causal=True
    )
    fits = (seq_lens >= 0) & (seq_lens <= max_pages * page_size)
    num_used = -(-seq_lens // page_size)
    unused = torch.arange(max_pages, device=seq_lens.device) >= num_used[:, None]
    exists = unused | ((page_table >= 0) & (page_table < num_pages))
    if ids_are_valid(block_indices, rows, starts_are_valid(starts, num_tokens) & fits.all() & exists.all()):
        return
    refuse_bad_starts("cu_seqlens_q", starts.tolist(), num_tokens)
    if not fits.all():
        sequence = int(fits.int().argmin())
        expected = f"0 to {max_pages * page_size}, {max_pages} pages of {page_size} keys"
        _refuse_value("INVALID_SEQ_LENS", "seq_lens", f"{sequence}", seq_lens[sequence], sequence, expected)
    if not exists.all():
        sequence, place = divmod(int(exists.int().argmin()), max_pages)
        need = f"its sequence's {int(seq_lens[sequence])} keys need {int(num_used[sequence])} pages"
        expected = f"0 to {num_pages - 1}, since {need}"
        value, index = page_table[sequence, place], f"{sequence}, {place}"
        _refuse_value("PAGE_OUT_OF_RANGE", "page_table", index, value, sequence, expected)
    raise first_offender(block_indices, rows, block_size=block_size, per_token=True)


def _refuse_value(
    reason: str, field: str, index: str, value: torch.Tensor, sequence: int, expected: str
) -> NoReturn:
    raise InputError(
        reason,
        field,
        f"{field}[{index}] is {int(value)}: expected {expected}",
        index=index,
        value=int(value),
        sequence=sequence,
        expected=expected,
    )

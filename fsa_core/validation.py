"""The contract of a call, checked where data enters; nothing that fails here reaches a kernel.

Checks go from the outside in, and the first fault found is the one reported: types, ranks and dtypes, heads
and dims, token counts, options, cu_seqlens, the shape of block_indices, and last its values, of which the
first offending one by head, token and slot is named (index_checks.py).

Reasons: INVALID_TYPE, INVALID_RANK, INVALID_DTYPE, INVALID_DEVICE, INVALID_HEADS, INVALID_HEAD_DIM,
INVALID_TOKENS, INVALID_BLOCK_SIZE, INVALID_QUERY_BLOCK_SIZE, INVALID_SOFTMAX_SCALE, INVALID_CAUSAL,
INVALID_WORKSPACE_LIMIT_BYTES, INVALID_CU_SEQLENS, INVALID_INDEX_SHAPE, INDEX_OUT_OF_RANGE, INDEX_NOT_CAUSAL,
INDEX_DUPLICATE; of compact patterns also INVALID_OFFSETS and INVALID_PATTERN.

Allowed on purpose: NaN and infinity in q, k and v; no tokens at all (the answer is empty); sequences of no
tokens; more queries than keys under causal (the first queries then see nothing, and have to select nothing).
"""

import math
from dataclasses import replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch

from fsa_core.compact import CompactPattern
from fsa_core.errors import InputError as InputError
from fsa_core.errors import refuse, refuse_bad_starts, refuse_value
from fsa_core.index_checks import IndexRows, first_offender, ids_are_valid
from fsa_core.packing import row_starts, sequence_starts
from fsa_core.problem import BLOCK_SIZES, MAX_HEAD_DIM, MAX_SLOTS, MIN_HEAD_DIM, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TOKENS = 2**31 - 1
FLOAT32 = torch.finfo(torch.float32)


def validate_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    query_block_size: int = 1,
    check_values: bool = True,
) -> Problem:
    """The sizes of a call of selected attention, or InputError.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim], all float16, bfloat16 or float32, on one device, of any
    strides. block_indices: int32 [1 | num_kv_heads | num_q_heads, rows, num_slots], with a row for every
    ``query_block_size`` queries of a sequence. cu_seqlens_*: int32 [num_sequences + 1]; None: one sequence.
    ``check_values=False`` leaves the contents of cu_seqlens and block_indices unread. Reading them, when they
    are valid, costs one synchronisation on CUDA if rows ascend, and at most three if they do not.
    """
    key = _description(
        (q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k),
        (block_size, softmax_scale, causal, query_block_size),
    )
    problem = None if key is None else _accepted.get(key)
    if problem is None:
        check_operands(q, k, v)
        block_size = checked_choice("block_size", block_size, BLOCK_SIZES)
        query_block_size = _checked_query_block_size(query_block_size)
        scale = checked_scale(softmax_scale, q.shape[2])
        causal = checked_flag("causal", causal)
        num_sequences = checked_sequences(cu_seqlens_q, cu_seqlens_k, q.device)
        check_index_shape(q, k, block_indices)
        if query_block_size == 1:
            check_row_count(block_indices, q.shape[0], "one a query token")
        problem = _problem(
            q,
            k,
            v,
            num_sequences=num_sequences,
            block_size=block_size,
            index_heads=block_indices.shape[0],
            num_slots=block_indices.shape[2],
            causal=causal,
            softmax_scale=scale,
            query_block_size=query_block_size,
        )
        _accept(key, problem)
    if check_values:
        starts = sequence_starts(q, k, cu_seqlens_q, cu_seqlens_k)
        sizes: dict[str, Any] = {"block_size": block_size, "query_block_size": query_block_size}
        _check_values(q, k, block_indices, *starts, causal=problem.causal, **sizes)
    return problem


MOST_ACCEPTED = 1024
# By all that decides it but values: to look up what was accepted takes a third of the time of looking again.
_accepted: dict[tuple[Any, ...], Problem] = {}
PLAIN_TYPES = frozenset((int, float, bool, type(None)))


def _description(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the checks look at but values, to find it by; None of what has to be looked at every time."""
    types = tuple(map(type, options))
    if not PLAIN_TYPES.issuperset(types):
        return None
    facts: list[Any] = []
    for x in tensors:
        if x is None:
            facts.append(None)
        elif isinstance(x, torch.Tensor):
            facts += (x.shape, x.dtype, x.device)
        else:
            return None
    # The types tell True from 1.
    return (*facts, *options, *types)


def _accept(description: tuple[Any, ...] | None, problem: Problem) -> None:
    if description is not None:
        if len(_accepted) >= MOST_ACCEPTED:
            _accepted.clear()
        _accepted[description] = problem


def validate_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    check_values: bool = True,
) -> Problem:
    """The sizes of a call of dense attention, or InputError; arguments as in validate_selected."""
    key = _description((q, k, v, cu_seqlens_q, cu_seqlens_k), (softmax_scale, causal))
    problem = None if key is None else _accepted.get(key)
    if problem is None:
        check_operands(q, k, v)
        scale = checked_scale(softmax_scale, q.shape[2])
        causal = checked_flag("causal", causal)
        problem = _problem(
            q,
            k,
            v,
            num_sequences=checked_sequences(cu_seqlens_q, cu_seqlens_k, q.device),
            block_size=0,
            index_heads=0,
            num_slots=0,
            causal=causal,
            softmax_scale=scale,
        )
        _accept(key, problem)
    if check_values:
        if cu_seqlens_q is not None:
            refuse_bad_starts("cu_seqlens_q", cu_seqlens_q.tolist(), q.shape[0])
        if cu_seqlens_k is not None:
            refuse_bad_starts("cu_seqlens_k", cu_seqlens_k.tolist(), k.shape[0])
    return problem


def validate_compact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: CompactPattern,
    *,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> Problem:
    """The sizes of a call, on the CPU, whose pattern is still to be written out, or InputError.

    ``num_slots`` may be more than the fullest row needs. Arguments as in validate_selected; the pattern says
    what its own tensors are.
    """
    problem = validate_dense(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=causal,
    )
    block_size = checked_choice("block_size", pattern.block_size, BLOCK_SIZES)
    query_block_size = _checked_query_block_size(pattern.query_block_size)
    index_heads, num_slots = pattern.check(problem, *sequence_starts(q, k, cu_seqlens_q, cu_seqlens_k))
    return replace(
        problem,
        index_heads=index_heads,
        num_slots=num_slots,
        block_size=block_size,
        query_block_size=query_block_size,
    )


def _problem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Problem:
    (num_q_tokens, num_q_heads, head_dim), (num_k_tokens, num_kv_heads, value_dim) = q.shape, v.shape
    return _known_problem(
        num_q_tokens=num_q_tokens,
        num_k_tokens=num_k_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        **rest,
    )


# Making one takes longer than finding it, and one that was found is faster to find things by.
_known_problem = lru_cache(maxsize=1024)(Problem)


def check_operands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, k_name: str = "k", v_name: str = "v"
) -> None:
    """Refuse operands that do not go together, each [tokens, heads, dim]."""
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        check_tensor(name, x, "[tokens, heads, dim]", 3)
        if x.dtype not in DTYPES:
            refuse("INVALID_DTYPE", name, "dtype", _name(x.dtype), "float16, bfloat16 or float32")
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            refuse("INVALID_DTYPE", name, "dtype", _name(x.dtype), f"{_name(q.dtype)}, that of q")
        check_device(name, x, q.device)
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        tokens, heads, dim = x.shape
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
            refuse("INVALID_HEAD_DIM", name, "head dim", dim, f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
        if heads == 0:
            refuse("INVALID_HEADS", name, "head count", 0, "at least 1")
        if tokens > MAX_TOKENS:
            refuse("INVALID_TOKENS", name, "token count", tokens, f"at most {MAX_TOKENS}")
    if k.shape[2] != q.shape[2]:
        refuse("INVALID_HEAD_DIM", k_name, "head dim", k.shape[2], f"{q.shape[2]}, that of q")
    if v.shape[0] != k.shape[0]:
        refuse("INVALID_TOKENS", v_name, "token count", v.shape[0], f"{k.shape[0]}, that of {k_name}")
    if v.shape[1] != k.shape[1]:
        refuse("INVALID_HEADS", v_name, "head count", v.shape[1], f"{k.shape[1]}, that of {k_name}")
    if q.shape[1] % k.shape[1]:
        raise InputError(
            "INVALID_HEADS",
            "q",
            f"{k_name} has {k.shape[1]} heads, q has {q.shape[1]}: q's must be a multiple",
            got=q.shape[1],
            expected=f"a multiple of {k.shape[1]}",
        )


def check_tensor(name: str, x: object, layout: str, rank: int) -> None:
    if not isinstance(x, torch.Tensor):
        refuse("INVALID_TYPE", name, "type", type(x).__name__, "torch.Tensor")
    if x.dim() != rank:
        shape = f"{x.dim()} (shape {list(x.shape)})"
        refuse("INVALID_RANK", name, "rank", shape, f"{rank}, {layout}")


def check_ints(name: str, x: torch.Tensor, layout: str, rank: int, device: torch.device | None) -> None:
    """Refuse what is not an int32 tensor of ``rank`` on ``device``, that of q; None: on any."""
    check_tensor(name, x, layout, rank)
    if x.dtype != torch.int32:
        refuse("INVALID_DTYPE", name, "dtype", _name(x.dtype), "int32")
    if device is not None:
        check_device(name, x, device)


def check_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        refuse("INVALID_DEVICE", name, "device", x.device, f"{device}, that of q")


def checked_choice(name: str, value: object, choices: tuple[int, ...]) -> int:
    """A plain integer, whatever kind of one (NumPy's, say) is given."""
    if not _is_int(value) or value not in choices:
        refuse_value(name, value, f"one of {', '.join(map(str, choices))}")
    return int(value)


def checked_flag(name: str, value: object) -> bool:
    """A plain bool, of Python's or NumPy's."""
    if not isinstance(value, bool | np.bool_):
        refuse_value(name, value, "True or False")
    return bool(value)


def checked_limit(workspace_limit_bytes: object) -> int:
    """A plain integer of at least 1, whatever kind of one (NumPy's, say) is given."""
    if not _is_int(workspace_limit_bytes) or workspace_limit_bytes < 1:
        refuse_value("workspace_limit_bytes", workspace_limit_bytes, "an integer of at least 1")
    return int(workspace_limit_bytes)


def _checked_query_block_size(value: object) -> int:
    if not _is_int(value) or not 1 <= value <= MAX_TOKENS:
        refuse_value("query_block_size", value, f"an integer from 1 to {MAX_TOKENS}")
    return int(value)


def checked_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    is_number = isinstance(softmax_scale, Real) and not isinstance(softmax_scale, bool)
    scale = as_float(softmax_scale) if is_number else math.nan
    # Kernels have it in float32, and may take what is subnormal there for 0.
    if not FLOAT32.tiny <= scale <= FLOAT32.max:
        expected = f"a finite number above 0, in float32 from {FLOAT32.tiny:.3g} to {FLOAT32.max:.3g}"
        refuse_value("softmax_scale", softmax_scale, expected)
    return scale


def as_float(x: Any) -> float:
    """A number; infinity for an integer or a fraction that is larger than any."""
    try:
        return float(x)
    except OverflowError:
        return math.inf


def checked_sequences(
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, device: torch.device | None
) -> int:
    """How many sequences there are; checks both cu_seqlens but for their values. One left out is one.

    ``device`` is that of q; None: there is no q.
    """
    lengths = {"cu_seqlens_q": 2, "cu_seqlens_k": 2}
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None:
            continue
        check_ints(name, x, "[num_sequences + 1]", 1, device)
        lengths[name] = x.numel()
        if lengths[name] < 2:
            refuse("INVALID_CU_SEQLENS", name, "length", x.numel(), "at least 2: a start and an end")
    if lengths["cu_seqlens_k"] != lengths["cu_seqlens_q"]:
        expected = f"{lengths['cu_seqlens_q']}, that of cu_seqlens_q"
        refuse("INVALID_CU_SEQLENS", "cu_seqlens_k", "length", lengths["cu_seqlens_k"], expected)
    return lengths["cu_seqlens_q"] - 1


def check_index_shape(q: torch.Tensor, k: torch.Tensor, block_indices: torch.Tensor) -> None:
    check_ints("block_indices", block_indices, "[heads, rows, slots]", 3, q.device)
    heads, _, slots = block_indices.shape
    allowed = (1, k.shape[1], q.shape[1])
    if heads not in allowed:
        expected = f"{' or '.join(map(str, sorted(set(allowed))))} (1, the heads of k, or those of q)"
        refuse("INVALID_INDEX_SHAPE", "block_indices", "head count", heads, expected)
    if not 1 <= slots <= MAX_SLOTS:
        refuse("INVALID_INDEX_SHAPE", "block_indices", "slot count", slots, f"1 to {MAX_SLOTS}")


def check_row_count(block_indices: torch.Tensor, expected: int, why: str) -> None:
    rows = block_indices.shape[1]
    if rows != expected:
        refuse("INVALID_INDEX_SHAPE", "block_indices", "row count", rows, f"{expected}, {why}")


def _check_values(
    q: torch.Tensor,
    k: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    query_block_size: int,
    causal: bool,
) -> None:
    num_rows = block_indices.shape[1]
    if q.is_cuda and query_block_size == 1 and num_rows == q.shape[0] > 0:
        # Triton is imported when a kernel is first needed.
        from fsa_core.kernels.index_check import certainly_valid

        ids = block_indices if block_indices[0].is_contiguous() else block_indices.contiguous()
        starts = (cu_seqlens_q, cu_seqlens_k)
        if certainly_valid(ids, *starts, k.shape[0], block_size=block_size, causal=causal):
            return
    index_rows = IndexRows.of(
        cu_seqlens_q,
        cu_seqlens_k,
        num_rows,
        block_size=block_size,
        query_block_size=query_block_size,
        causal=causal,
    )
    valid = starts_are_valid(cu_seqlens_q, q.shape[0]) & starts_are_valid(cu_seqlens_k, k.shape[0])
    valid &= row_starts(cu_seqlens_q, query_block_size)[-1] == num_rows
    if ids_are_valid(block_indices, index_rows, valid):
        return
    refuse_bad_starts("cu_seqlens_q", cu_seqlens_q.tolist(), q.shape[0])
    refuse_bad_starts("cu_seqlens_k", cu_seqlens_k.tolist(), k.shape[0])
    expected_rows = int(row_starts(cu_seqlens_q, query_block_size)[-1])
    check_row_count(block_indices, expected_rows, f"one for {query_block_size} queries of a sequence")
    raise first_offender(block_indices, index_rows, block_size=block_size, per_token=query_block_size == 1)


def starts_are_valid(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

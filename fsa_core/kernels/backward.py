"""Gradients of selected attention: KV blocks outside, the query tokens that chose them inside.

Flash Sparse Attention, arXiv 2508.18224. With P = exp(scores - lse) recomputed tile by tile and
delta = sum(out * grad_out) - grad_lse:

    grad_v = P^T grad_out        grad_scores = P * (grad_out v^T - delta)
    grad_k = grad_scores^T q * scale        grad_q = grad_scores k * scale

Stages, no host synchronisation: delta; an index in a fixed order (sorted_index); the gradients of k and v of
its work items, and each pair's share of grad_q beside (key_gradients). Or grad_q is made apart, if the plan
says so (query_gradients): beside the rest, or before it, and then delta with it.

No atomics: the bits are the same on every run. The gradients of q do not depend on what else is packed into
the call; those of k and v do not where all tokens ride in one chunk, with items of one size (backward_plan).
"""

from collections.abc import Callable
from functools import lru_cache

import torch

from fsa_core.backward_plan import QUERY_ROWS, BackwardPlan, plan_backward
from fsa_core.kernels import hopper
from fsa_core.kernels.chunk_buffers import chunk_buffers
from fsa_core.kernels.delta import write_delta
from fsa_core.kernels.key_gradients import Call, Workspace, parts, sort, walk
from fsa_core.kernels.launch import aside, rejoin
from fsa_core.kernels.pair_query_gradients import MOST_KEYS
from fsa_core.kernels.query_gradients import QueryGradients
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR
from fsa_core.problem import Problem
from fsa_core.tiles import Tuning

# Of a call: q, k, v, block_indices, two of starts, out, lse, grad_out and three gradients.
CALL_TENSORS = 12


def selected_attention_backward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    kept: torch.Tensor | None = None,
    *,
    path: str = KV_MAJOR,
    tuning: Tuning | None = None,
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of selected attention over packed sequences; every tensor contiguous and on one device.

    q [total_q, num_q_heads, head_dim], k [total_k, num_kv_heads, head_dim], v [total_k, num_kv_heads,
    value_dim], block_indices int32 [index_heads, total_q, slots], cu_seqlens int32 [num_sequences + 1]; out,
    grad_out [total_q, num_q_heads, value_dim] and lse, grad_lse float32 [total_q, num_q_heads], total_q > 0;
    grad_lse may be None, for zeros. path and tuning as in ``plan_backward``, which says what raises
    ValueError; on what path the forward pass went does not matter. kept: what ``selected_attention_keeping``
    kept, if anything. Returns the gradients of q, k and v, in their shapes and dtypes.
    """
    p, device = problem, q.device
    plan, parts_of_heads = planned(p, device, hopper.runs_on(device), workspace_limit_bytes, path, tuning)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    tensors = (q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, out, lse, grad_out, *grads)
    others = [x for x in (grad_lse, kept) if x is not None]
    options = (p, plan, grad_lse is not None, kept is not None)
    for kv_heads in parts_of_heads:
        if plan.queries is None or plan.at_once:
            _replayed((*tensors, *others), *options, kv_heads)
            continue
        # Two calls: what the first took is free again before the second takes as much.
        (delta,) = _replayed_queries((*tensors, *others), *options, kv_heads)
        _replayed_keys((*tensors, delta), p, plan, kv_heads)
        del delta
    return grads


# One look-up for all that a call has to know before it is launched. Of more problems than have programs
# (replay.py): one that is planned anew finds none of its own.
@lru_cache(maxsize=1 << 15)
def planned(
    problem: Problem,
    device: torch.device,
    _on_hopper: bool,
    workspace_limit_bytes: int,
    path: str,
    tuning: Tuning | None,
) -> tuple[BackwardPlan, tuple[range, ...]]:
    """The plan of a call, and the KV heads that have their gradients at a time.

    ``_on_hopper``: what ``hopper.runs_on`` says, so that whoever stands in for it gets a plan to go with it.
    """
    query_rows = query_tile_rows(problem, device)
    buffers = chunk_buffers(problem, device, MOST_KEYS, hopper.MIN_GRADIENT_BYTES)
    plan = plan_backward(problem, workspace_limit_bytes, path, tuning, query_rows, buffers)
    return plan, tuple(parts(range(problem.num_kv_heads), plan.delta_heads))


def query_tile_rows(problem: Problem, device: torch.device) -> int:
    """Of the query tiles of 16 bits that grad_q is made in: as many as the device's kernel takes."""
    return _query_tile_rows_on_hopper(problem) if hopper.runs_on(device) else QUERY_ROWS


@lru_cache(maxsize=1024)
def _query_tile_rows_on_hopper(problem: Problem) -> int:
    from fsa_core.kernels import hopper_tile_query_gradients
    from fsa_core.kernels.hopper_tiles import ROWS

    return ROWS if hopper_tile_query_gradients.fills(problem) else QUERY_ROWS


def _gradients(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    plan: BackwardPlan,
    with_grad_lse: bool,
    with_kept: bool,
    kv_heads: range,
) -> None:
    """All under some KV heads: those of q from the same products as those of k and v, or beside them."""
    call, kept = _call(memory.new_empty, tensors, problem, plan, with_grad_lse, with_kept, kv_heads)
    workspace, given = Workspace.of(call, memory), call.given
    queries = _queries(memory, call, kv_heads, kept) if plan.at_once else None
    with aside():
        sort(call, workspace, next(parts(kv_heads, plan.keys.kv_heads)))
    write_delta(given.out, given.grad_out, given.grad_lse, given.delta, given.first_delta_head)
    if queries is not None:
        # Whose programs are launched first are the first on the multiprocessors. Measured on an H200, 8K
        # tokens, milliseconds with tiles first and with keys first: g = 1 0.18 and 0.19, of random choices
        # 0.27 and 0.31; g = 2 0.31 and 0.29, g = 4 0.53 and 0.50.
        queries.list_ahead(with_index=problem.heads_per_pair == 1)
    rejoin()
    if queries is not None:
        with aside():
            queries.write(with_delta=False)
    _write_keys(call, workspace, kv_heads)


def _query_gradients(
    memory: Memory,
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    plan: BackwardPlan,
    with_grad_lse: bool,
    with_kept: bool,
    kv_heads: range,
) -> None:
    """The gradient of q under some KV heads, made apart; the answer is their delta."""
    call, kept = _call(memory.answer, tensors, problem, plan, with_grad_lse, with_kept, kv_heads)
    _queries(memory, call, kv_heads, kept).write(with_delta=True)


def _key_gradients(
    memory: Memory, tensors: tuple[torch.Tensor, ...], problem: Problem, plan: BackwardPlan, kv_heads: range
) -> None:
    """Gradients of k and v under some KV heads; the last of ``tensors`` is their delta."""
    *others, delta = tensors
    call = Call.of(problem, plan, kv_heads, tuple(others), delta, None)
    _write_keys(call, Workspace.of(call, memory), kv_heads)


def _call(
    new: Callable[..., torch.Tensor],
    tensors: tuple[torch.Tensor, ...],
    problem: Problem,
    plan: BackwardPlan,
    with_grad_lse: bool,
    with_kept: bool,
    kv_heads: range,
) -> tuple[Call, torch.Tensor | None]:
    """The call with room for delta, which ``new`` makes, and what was kept.

    Behind the ``tensors`` of a call come grad_lse and what was kept, if they are there.
    """
    others = list(tensors[CALL_TENSORS:])
    kept = others.pop() if with_kept else None
    grad_lse = others.pop() if with_grad_lse else None
    delta = new(problem.num_q_tokens, len(kv_heads) * problem.group_size, dtype=torch.float32)
    return Call.of(problem, plan, kv_heads, tensors[:CALL_TENSORS], delta, grad_lse), kept


def _queries(memory: Memory, call: Call, kv_heads: range, kept: torch.Tensor | None) -> QueryGradients:
    plan, ranks = call.plan.queries, call.plan.tile_heads_per_kv_head
    assert plan is not None
    heads = range(kv_heads.start * ranks, kv_heads.stop * ranks)
    return QueryGradients(
        call.problem, plan, heads, call.given, call.block_indices, call.grads[0], memory, kept
    )


def _write_keys(call: Call, workspace: Workspace, kv_heads: range) -> None:
    plan = call.plan
    for indexed_heads in parts(kv_heads, plan.keys.kv_heads):
        for start in range(0, plan.segments, plan.keys.range_segments):
            walk(call, workspace, indexed_heads, start)


_replayed = Replayed(_gradients)
_replayed_queries, _replayed_keys = Replayed(_query_gradients), Replayed(_key_gradients)

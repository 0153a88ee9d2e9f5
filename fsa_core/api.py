"""The public functions: validate, choose an implementation, run it."""

import os
from functools import lru_cache, partial
from typing import Any

import torch

from fsa_core.autograd import Answer, Implementation, differentiable_attention, in_torch
from fsa_core.cpu import selected_attention_cpu
from fsa_core.cpu_backward import selected_attention_cpu_backward
from fsa_core.dense import dense_attention_forward
from fsa_core.dense_backward import dense_attention_backward
from fsa_core.dispatch import AUTO, check_path, choose, device_name
from fsa_core.packing import sequence_starts
from fsa_core.patterns import expand_query_blocks
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from fsa_core.problem import Problem
from fsa_core.reference import (
    dense_attention_reference,
    dense_attention_reference_backward,
    selected_attention_reference,
    selected_attention_reference_backward,
)
from fsa_core.validation import checked_limit, validate_dense, validate_selected

BACKENDS = ("auto", "triton", "cpu", "reference")


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_block_size: int = 1,
    backend: str = "auto",
    path: str = "auto",
    validate: bool = True,
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Answer:
    """softmax(q k^T * softmax_scale) v over the KV blocks that each query token selected.

    Differentiable once in q, k and v, through out and through lse.

    Args:
        q: [num_q_tokens, num_q_heads, head_dim], float16, bfloat16 or float32; head_dim 16 to 256. Query i
            of a sequence sits at position len_k - len_q + i.
        k: [num_k_tokens, num_kv_heads, head_dim]; num_q_heads is any multiple of num_kv_heads.
        v: [num_k_tokens, num_kv_heads, value_dim]; value_dim 16 to 256.
        block_indices: int32 [1 | num_kv_heads | num_q_heads, rows, num_slots], ids of blocks inside the row's
            own sequence, unique in a row, -1 in unused slots, in any order; ascending rows are checked
            fastest. One row a query token, or one for ``query_block_size`` queries of a sequence.
        block_size: keys in a block: 16, 32, 64, 128 or 256. The last block of a sequence may be short.
        cu_seqlens_q, cu_seqlens_k: int32 [num_sequences + 1], where each packed sequence starts, and the
            total; None: one sequence.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: a token sees no key after its own position, and selects no block after its own.
        backend: "auto" (Triton kernels for CUDA tensors, "cpu" for CPU tensors), "triton", "cpu" or
            "reference" (float64, slow). A named backend runs or raises; it is never exchanged for another.
        path: how the Triton kernels go about the forward pass and the gradient of q: "auto" (by shape, as
            measured on this kind of GPU, and by query tiles where queries share rows that fill them; see
            ``fsa_core.dispatch``), "kv_major" (KV blocks outside, inside
            the tokens that chose them), "query_tile" (tiles of neighbouring tokens outside, inside the blocks
            that any of them chose), "mixed" (query tiles for what neighbours share, KV-major for the rest) or
            "token_major" (query tiles for what neighbours share, each token by itself for the rest; the
            gradient of q as "mixed"). A named path runs or raises. Gradients of k and v are computed the same
            way on every path.
        validate: False leaves the values of block_indices and cu_seqlens unread, which saves waiting for the
            device and works inside a CUDA graph. Ids that break the contract are then ignored or give a wrong
            answer, but touch no foreign memory; cu_seqlens must be right.
        workspace_limit_bytes: device memory that the Triton kernels may take beyond inputs and outputs; at
            least 1, and the least that they need whatever it is. Up to a quarter of it is kept for the
            gradients, if any may be asked for, as long as autograd keeps the inputs.

    Returns:
        out [num_q_tokens, num_q_heads, value_dim] in q's dtype, and lse float32 [num_q_tokens, num_q_heads],
        the natural log of the sum of exponentials of each row of scores. A token without keys gives 0 and
        -inf, and no gradient. Bitwise the same whatever else is packed into the call. Gradients are bitwise
        the same on every run, and but for those of k and v from Triton in any company.

    Raises:
        InputError: the call breaks the contract above.
        ValueError: the backend or the path is unknown or cannot run on these tensors; a table of
            measurements (``fsa_core.tuning_table``) is not valid.
        torch.OutOfMemoryError: as any CUDA allocation.

    Source: Flash Sparse Attention, arXiv 2508.18224; the selected branch of NSA, arXiv 2502.11089.
    """
    workspace_limit_bytes = checked_limit(workspace_limit_bytes)
    problem = validate_selected(
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=causal,
        query_block_size=query_block_size,
        check_values=validate,
    )
    cu_seqlens_q, cu_seqlens_k = sequence_starts(q, k, cu_seqlens_q, cu_seqlens_k)
    rows = expand_query_blocks(
        block_indices,
        query_block_size=problem.query_block_size,
        block_size=problem.block_size,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=problem.causal,
        num_q_tokens=problem.num_q_tokens,
    )
    tensors = (q, k, v, rows, cu_seqlens_q, cu_seqlens_k)
    return attend(problem, *tensors, backend=backend, path=path, workspace_limit_bytes=workspace_limit_bytes)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Answer:
    """softmax(q k^T * softmax_scale) v over every key that a token may see; as ``selected_attention``.

    There is one implementation a device, torch's own: "auto", "triton" and "cpu" all mean it, on tensors of
    a device that they can run on. Gradients are plain matrix products in float32: right, not fast, and their
    last bits may depend on what else is packed into the call.
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
    starts = sequence_starts(q, k, cu_seqlens_q, cu_seqlens_k)
    return attend(problem, q, k, v, None, *starts, backend=backend)


def attend(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    backend: str = "auto",
    path: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Answer:
    """Run an already validated problem; block_indices is in normal form, or None for dense attention.

    Shapes, answer and options as in ``selected_attention``. Raises ValueError when the backend or the path
    cannot run on these tensors; dense attention has no paths.
    """
    backend = resolve_backend(backend, q.device)
    _check_path(path, backend, is_dense=block_indices is None)
    if block_indices is None:
        implementation = _dense(backend)
    else:
        implementation = selected_implementation(backend, problem, q.device, path, workspace_limit_bytes)
    rest = (block_indices, cu_seqlens_q, cu_seqlens_k)
    tensors = [x.contiguous() for x in (q, k, v, *rest) if x is not None]
    return differentiable_attention(implementation, problem, *tensors)


def selected_implementation(
    backend: str, problem: Problem, device: torch.device, path: str, workspace_limit_bytes: int
) -> Implementation:
    """Selected attention of a problem, on a backend that is resolved."""
    if backend == "triton":
        return _kernels(problem, device, path, workspace_limit_bytes)
    return _SELECTED_CPU if backend == "cpu" else _SELECTED_REFERENCE


_SELECTED_CPU = in_torch(selected_attention_cpu, selected_attention_cpu_backward)
_SELECTED_REFERENCE = in_torch(selected_attention_reference, selected_attention_reference_backward)
_DENSE = in_torch(dense_attention_forward, dense_attention_backward)
_DENSE_REFERENCE = in_torch(dense_attention_reference, dense_attention_reference_backward)


def _dense(backend: str) -> Implementation:
    return _DENSE_REFERENCE if backend == "reference" else _DENSE


# Found once a call, for its gradients too: autograd keeps it.
@lru_cache(maxsize=1024)
def _kernels(problem: Problem, device: torch.device, path: str, workspace_limit_bytes: int) -> Implementation:
    """The kernels on the path and with the sizes of the problem."""
    # Triton is imported when a kernel is first needed.
    from fsa_core.kernels.backward import selected_attention_backward
    from fsa_core.kernels.forward import selected_attention_forward
    from fsa_core.kernels.keeping import selected_attention_keeping

    choice = choose(problem, device_name(device), path)
    options: dict[str, Any] = {"tuning": choice.tuning, "workspace_limit_bytes": workspace_limit_bytes}
    return Implementation(
        partial(selected_attention_forward, path=choice.path, **options),
        partial(selected_attention_backward, path=choice.backward_path, **options),
        partial(selected_attention_keeping, path=choice.path, backward_path=choice.backward_path, **options),
    )


def _check_path(path: str, backend: str, *, is_dense: bool) -> None:
    check_path(path)
    if path != AUTO and is_dense:
        raise ValueError(f"path {path!r} is one of selected attention; dense attention has none")
    if path != AUTO and backend != "triton":
        raise ValueError(f"path {path!r} is one of backend 'triton', and this call runs {backend!r}")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend to run, after checking that it can run there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, not tensors on {device}")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' takes CUDA tensors, not tensors on {device}; "
            "TRITON_INTERPRET=1 in the environment runs the kernels in Triton's interpreter"
        )
    return backend

"""The operator's public functions: validate, run each branch, add them up by their gates.

Positions, packing and errors are those of ``fsa_core.api``: query i of a sequence sits at position
len_k - len_q + i, cu_seqlens_* are int32 [num_sequences + 1] (None: one sequence), attention is causal. Every
function is differentiable but ``select_blocks``, whose answer is ids, and keeps what it holds at once, beside
inputs and answers, near ``workspace_limit_bytes``. On CUDA they read cu_seqlens, which synchronises. A NaN in
v may reach queries of its sequence that do not see it, as in any tiled attention, but no other sequence.
"""

import torch

from fsa_core.api import resolve_backend
from fsa_core.nsa.compression import Compression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.operator import attend_at_once, attend_branches
from fsa_core.nsa.stages import (
    add_branches,
    attend_last_keys,
    attend_windows,
    check_stage_backend,
    choose_blocks,
    launches_alone,
)
from fsa_core.nsa.validation import (
    Call,
    check_branches,
    check_compressed,
    check_compression,
    check_gates,
    check_window_count,
    validate_over_keys,
    validate_over_windows,
)
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from fsa_core.validation import check_operands

Answer = tuple[torch.Tensor, torch.Tensor]


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Answer:
    """Attention over compressed keys: a query sees a window once it sees the window's last key.

    Args:
        q: [num_q_tokens, num_q_heads, head_dim], float16, bfloat16 or float32.
        k_cmp: [num_windows, num_kv_heads, head_dim], the windows of each sequence in turn, as
            ``Compression`` gives them; num_q_heads is any multiple of num_kv_heads.
        v_cmp: [num_windows, num_kv_heads, value_dim].
        config: kernel_size and stride say which keys a window covers.
        cu_seqlens_k: of the keys before compression; None: as many keys as queries.
        softmax_scale: default 1 / sqrt(head_dim).
        backend: "auto" (Triton kernels for CUDA tensors, torch operations for others), "triton" or "torch".
            A named backend runs or raises.

    Returns:
        out [num_q_tokens, num_q_heads, value_dim] in q's dtype, and lse float32 [num_q_tokens, num_q_heads],
        natural log. Queries before the end of the first window give 0 and -inf.

    Raises:
        InputError: the call breaks the contract; errors that call a tensor k or v mean the compressed one.
        ValueError: the backend is unknown or cannot run on these tensors.

    Source: Native Sparse Attention, arXiv 2502.11089, equations 7 and 8.
    """
    call = validate_over_windows(
        q,
        k_cmp,
        v_cmp,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    check_stage_backend(backend, q)
    return attend_windows(call, q, k_cmp, v_cmp, backend)


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> torch.Tensor:
    """The blocks that compressed attention finds important; arguments as in ``compressed_attention``.

    A window's probability counts once for every stride that it shares with a block, and the heads of a group
    are summed. Forced blocks (``config``) come first, then the others by importance, the lower id before the
    higher where they are equal, until ``top_k``, ``top_p`` or ``min_share`` ends the row.

    Returns int32 [num_kv_heads, num_q_tokens, top_k], ascending in a row, -1 in unused slots: what
    ``selected_attention`` takes as block_indices.

    Source: Native Sparse Attention, arXiv 2502.11089, equations 9 to 11.
    """
    call = validate_over_windows(
        q,
        k_cmp,
        k_cmp,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    check_stage_backend(backend, q)
    return choose_blocks(call, q, k_cmp, backend)


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Answer:
    """Attention over the last ``config.window`` keys up to a query's own.

    q: [num_q_tokens, num_q_heads, head_dim], k: [num_k_tokens, num_kv_heads, head_dim],
    v: [num_k_tokens, num_kv_heads, value_dim]. Backend and the returned out and lse as in
    ``compressed_attention``.
    """
    call = validate_over_keys(
        q,
        k,
        v,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    check_stage_backend(backend, q)
    return attend_last_keys(call, q, k, v, backend)


def gated_sum(
    branches: tuple[torch.Tensor, ...], gates: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Equation 5: each branch [num_q_tokens, num_q_heads, value_dim] times its gate, added in float32.

    gates: [num_q_tokens, num_q_heads, number of branches]. Returns the dtype of the branches. Kernels add
    three branches, as the operator has; any other number is added in torch operations. Raises as
    ``compressed_attention``.
    """
    check_branches(branches)
    check_gates(gates, branches[0], len(branches))
    check_stage_backend(backend, gates)
    return add_branches(branches, gates, backend)


def nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    compress_k: Compression,
    compress_v: Compression,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> torch.Tensor:
    """Native Sparse Attention: compressed, selected and sliding-window attention, added up by their gates.

    Args:
        q: [num_q_tokens, num_q_heads, head_dim], float16, bfloat16 or float32.
        k: [num_k_tokens, num_kv_heads, head_dim]; v: [num_k_tokens, num_kv_heads, value_dim].
        gates: [num_q_tokens, num_q_heads, 3], for the compressed, the selected and the window branch.
        compress_k, compress_v: how windows of k and of v become one; of ``config``'s kernel_size and stride.
        softmax_scale: of all branches, default 1 / sqrt(head_dim).
        backend: as in ``fsa_core.api``, for selected attention. With "triton" the other stages have kernels,
            too, and else torch operations.

    Returns:
        [num_q_tokens, num_q_heads, value_dim] in q's dtype. Gradients flow to q, k, v, gates and the
        parameters of both compressions; the choice of blocks has none.

    Raises:
        InputError: the call breaks the contract.
        ValueError: the backend is unknown or cannot run on these tensors.

    Source: Native Sparse Attention, arXiv 2502.11089. Branches share one k and v, as in public
    implementations; the paper gives each its own, for which call the branches and ``gated_sum``.
    """
    call = validate_over_keys(
        q,
        k,
        v,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    check_gates(gates, q)
    resolve_backend(backend, q.device)
    check_compression("compress_k", compress_k, config)
    check_compression("compress_v", compress_v, config)
    k_cmp, v_cmp = compress_k(k, call.key_starts), compress_v(v, call.key_starts)
    check_compressed(k_cmp, v_cmp, k, v)
    return attend_checked(call, q, k, v, k_cmp, v_cmp, gates, backend)


def nsa_attention_from_compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    *,
    config: NSAConfig,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    workspace_limit_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> torch.Tensor:
    """``nsa_attention`` of K and V that are compressed already: from a cache, or before a rotation.

    k_cmp: [num_windows, num_kv_heads, head_dim], v_cmp: [num_windows, num_kv_heads, value_dim].
    """
    call = validate_over_keys(
        q,
        k,
        v,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    check_operands(q, k_cmp, v_cmp, k_name="k_cmp", v_name="v_cmp")
    check_window_count(call, k_cmp)
    check_compressed(k_cmp, v_cmp, k, v)
    check_gates(gates, q)
    resolve_backend(backend, q.device)
    return attend_checked(call, q, k, v, k_cmp, v_cmp, gates, backend)


def attend_checked(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """``nsa_attention_from_compressed`` of a call whose operands and starts are known to be right."""
    if launches_alone(call, q, k_cmp, backend):
        return attend_at_once(call, backend, (q, k, v, k_cmp, v_cmp, gates))
    return attend_branches(call, backend, q, k, v, k_cmp, v_cmp).add(gates, backend)

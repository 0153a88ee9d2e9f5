"""Decode: selected attention of one or a few new tokens a sequence over a paged KV cache."""

from dataclasses import replace

import torch

from fsa_core.api import attend, resolve_backend
from fsa_core.autocast import in_own_precision
from fsa_core.cpu_decode import paged_selected_attention_cpu
from fsa_core.packing import starts_of
from fsa_core.paged_validation import validate_paged
from fsa_core.problem import Problem


@torch.no_grad()
@in_own_precision
def paged_selected_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens_q: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    validate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``selected_attention``, causal, of the last tokens of sequences whose keys lie in pages.

    It reads the chosen blocks and nothing else of the cache. The new tokens' keys have to be in it.

    Args:
        q: [num_q_tokens, num_q_heads, head_dim], float16, bfloat16 or float32; head_dim 16 to 256. The
            queries of a sequence are its last tokens: query i sits at position seq_len - q_len + i.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], page_size a multiple of block_size;
            num_q_heads is any multiple of num_kv_heads. Never copied, whatever its strides (fast where the
            channels of a key are neighbours): a view of a cache of K and V, say, or of [pages, heads, keys].
        v_cache: [num_pages, page_size, num_kv_heads, value_dim]; value_dim 16 to 256.
        page_table: int32 [num_sequences, max_pages], the pages of each sequence in order; those behind its
            last key are not read. Sequences may share pages.
        block_indices: int32 [1 | num_kv_heads | num_q_heads, num_q_tokens, num_slots], ids of blocks inside
            the token's own sequence, unique in a row, none after the token's own, -1 in unused slots, in any
            order.
        seq_lens: int32 [num_sequences], keys of each sequence in the cache, the new tokens' included.
        block_size: keys in a block: 16, 32, 64, 128 or 256. The last block of a sequence may be short.
        cu_seqlens_q: int32 [num_sequences + 1], where the queries of each sequence start, and their total;
            None: one query a sequence.
        softmax_scale: default 1 / sqrt(head_dim).
        backend: "auto" (Triton kernels for CUDA tensors, "cpu" for CPU tensors), "triton", "cpu" or
            "reference" (float64, slow). A named backend runs or raises; it is never exchanged for another.
        validate: False leaves the values of page_table, block_indices, seq_lens and cu_seqlens_q unread,
            which saves waiting for the device and works inside a CUDA graph. Ids and pages that break the
            contract are then ignored or give a wrong answer, but touch no foreign memory; cu_seqlens_q must
            be right.

    Returns:
        out [num_q_tokens, num_q_heads, value_dim] in q's dtype, and lse float32 [num_q_tokens, num_q_heads],
        the natural log of the sum of exponentials of each row of scores. A token without keys gives 0 and
        -inf. With Triton bitwise the same whatever else is in the call. There are no gradients.

    Raises:
        InputError: the call breaks the contract above.
        ValueError: the backend is unknown or cannot run on these tensors.

    Source: the split over keys is that of Flash-Decoding (https://pytorch.org/blog/flash-decoding/); names
    are those of FlashAttention and FlashInfer.
    """
    problem = validate_paged(
        q,
        k_cache,
        v_cache,
        page_table,
        block_indices,
        seq_lens,
        block_size=block_size,
        cu_seqlens_q=cu_seqlens_q,
        softmax_scale=softmax_scale,
        check_values=validate,
    )
    backend = resolve_backend(backend, q.device)
    q, block_indices, seq_lens = q.contiguous(), block_indices.contiguous(), seq_lens.contiguous()
    tensors = (q, k_cache, v_cache, page_table, block_indices, seq_lens)
    if backend == "triton":
        # Triton is imported when a kernel is first needed.
        from fsa_core.kernels.decode import paged_selected_attention_forward

        return paged_selected_attention_forward(problem, *tensors, cu_seqlens_q)
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(problem.num_q_tokens + 1, dtype=torch.int32, device=q.device)
    run = paged_selected_attention_cpu if backend == "cpu" else _reference
    return run(problem, *tensors, cu_seqlens_q)


def _reference(
    problem: Problem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    block_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of all sequences, packed, under the oracle.

    Lengths and pages that nobody validated are bounded by the table and by the cache.
    """
    num_pages, page_size = k_cache.shape[:2]
    seq_lens = seq_lens.long().clamp_(0, page_table.shape[1] * page_size)
    starts = starts_of(seq_lens)
    sequence = torch.arange(len(seq_lens), device=q.device).repeat_interleave(seq_lens)
    key = torch.arange(len(sequence), device=q.device) - starts[sequence]
    page = page_table[sequence, key // page_size].long().clamp_(0, num_pages - 1)
    places = (page, key % page_size)
    packed = replace(problem, num_k_tokens=len(sequence))
    rest = (block_indices, cu_seqlens_q, starts)
    return attend(packed, q, k_cache[places], v_cache[places], *rest, backend="reference")

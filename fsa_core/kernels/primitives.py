"""Device functions that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(cu_seqlens_ptr, token, num_sequences, search_steps):
    """The sequence that holds packed ``token`` (a scalar or a tensor of token numbers).

    ``cu_seqlens`` is int32 [num_sequences + 1]; ``search_steps`` is ceil(log2(num_sequences)), so a single
    sequence costs no load. Zero-length sequences hold nothing and are never the answer.
    """
    sequence = token * 0
    for step in range(search_steps):
        probe = sequence + (1 << (search_steps - 1 - step))
        start = tl.load(cu_seqlens_ptr + probe, mask=probe < num_sequences, other=2147483647)
        sequence = tl.where(start <= token, probe, sequence)
    return sequence


@triton.jit
def find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE: tl.constexpr):
    """The sequence whose KV blocks include number ``segment``, as first_segment numbers them."""
    sequence = segment * 0
    for step in range(search_steps):
        probe = sequence + (1 << (search_steps - 1 - step))
        inside = probe < num_sequences
        start = tl.load(cu_seqlens_k_ptr + probe, mask=inside, other=0) // BLOCK_SIZE + probe
        sequence = tl.where(inside & (start <= segment), probe, sequence)
    return sequence


@triton.jit
def first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE: tl.constexpr):
    """Number of a sequence's first KV block when the blocks of all sequences are numbered through.

    floor(start / BLOCK_SIZE) + sequence leaves every sequence at least as many numbers as it has blocks
    (some stay unused) without a prefix sum over block counts.
    """
    return tl.load(cu_seqlens_k_ptr + sequence) // BLOCK_SIZE + sequence

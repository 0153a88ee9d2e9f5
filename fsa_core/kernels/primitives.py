"""Device functions that the kernels share."""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite(row_max):
    """What to subtract from a row of scores: its maximum, or 0 where it sees no key, whose weights are 0."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def reciprocal(row_sum):
    """What to multiply a row's weighted values by; 1 where it has no weights.

    A division for every value would compile to five instructions each: a quarter of the partial kernel.
    """
    return 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit
def natural_lse(row_max, row_sum, scale):
    """The natural log-sum-exp of a row whose maximum is not scaled; ``scale`` is in log2 units.

    Multiplied and added in one rounding, which a compiler may else do in one kernel and not in its twin.
    """
    return tl.fma(row_max, scale, tl.log2(row_sum)) * LN_2


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


@triton.jit
def find_block(
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE: tl.constexpr
):
    """Of KV block number ``segment``: its first key in its sequence, and that sequence's keys and queries.

    Returns block_start; k_start and k_length, the sequence's first packed key and how many it has; and
    q_shift, which turns a packed query token into its position among the sequence's keys.
    """
    sequence = find_segment_sequence(cu_seqlens_k_ptr, segment, num_sequences, search_steps, BLOCK_SIZE)
    block_start = (segment - first_segment(cu_seqlens_k_ptr, sequence, BLOCK_SIZE)) * BLOCK_SIZE
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    q_shift = k_length - tl.load(cu_seqlens_q_ptr + sequence + 1)
    return block_start, k_start, k_length, q_shift


@triton.jit
def blocks_of_tokens(
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    packed_tokens,
    num_sequences,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
):
    """Of each token's sequence: the first KV block, as first_segment numbers it, and how many there are."""
    sequences = find_sequence(cu_seqlens_q_ptr, packed_tokens, num_sequences, search_steps)
    k_start = tl.load(cu_seqlens_k_ptr + sequences)
    k_length = tl.load(cu_seqlens_k_ptr + sequences + 1) - k_start
    first = first_segment(cu_seqlens_k_ptr, sequences, BLOCK_SIZE)
    return first, (k_length + BLOCK_SIZE - 1) // BLOCK_SIZE


@triton.jit
def load_segments(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    first_token,
    first_row_token,
    num_tokens,
    chunk_tokens,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    first_head,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Of this program's pairs [TOKENS, SLOTS]: rows, segments (-1 for none), which exist, and places.

    ``first_row_token`` is the packed token that the first row of indices belongs to. Ids that name no block
    of the token's sequence select nothing, so that no index can reach memory it should not.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    head = (first_head + tl.program_id(2)).to(tl.int64)
    inside = (tokens < num_tokens)[:, None] & (slots < num_slots)[None, :]
    packed_tokens = first_token + tokens
    places = (packed_tokens - first_row_token).to(tl.int64)[:, None] * num_slots + slots[None, :]
    blocks = tl.load(indices_ptr + head * head_stride + places, mask=inside, other=-1)
    first, num_blocks = blocks_of_tokens(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, packed_tokens, num_sequences, search_steps, BLOCK_SIZE
    )
    valid = inside & (blocks >= 0) & (blocks < num_blocks[:, None])
    segments = first[:, None] + blocks
    rows = tl.program_id(2) * num_chunks + tokens // chunk_tokens
    group_places = tokens[:, None] * num_slots + slots[None, :]
    return rows, tl.where(valid, segments, -1), inside, group_places

"""Which tokens a query tile has, and which keys they see. Tiles are cut from the start of each sequence."""

import triton
import triton.language as tl

from fsa_core.kernels.primitives import find_segment_sequence, first_segment
from fsa_core.plan import Group
from fsa_core.problem import Problem


@triton.jit
def tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS: tl.constexpr):
    """A tile's sequence, its first packed token (not before the end if there is no tile), and that end."""
    sequence = find_segment_sequence(cu_seqlens_q_ptr, tile, num_sequences, search_steps, TOKENS)
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    first = q_start + (tile - first_segment(cu_seqlens_q_ptr, sequence, TOKENS)) * TOKENS
    return sequence, first, tl.load(cu_seqlens_q_ptr + sequence + 1)


@triton.jit
def tile_keys(cu_seqlens_k_ptr, sequence, first, q_end, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr):
    """The blocks of a tile's sequence, and the keys that its first token sees, as all others do."""
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence)
    num_seen = tl.minimum(first + k_length - q_end + 1, k_length) if CAUSAL else k_length
    return (k_length + BLOCK_SIZE - 1) // BLOCK_SIZE, num_seen


def tiles_of(problem: Problem, tokens: int, group: Group) -> tuple[int, int]:
    """The first tile of ``tokens`` that may meet a group's, and how many may: without reading cu_seqlens."""
    first_tile = max(group.first_token // tokens - 1, 0)
    last_tile = (group.first_token + group.num_tokens - 1) // tokens + problem.num_sequences
    return first_tile, last_tile - first_tile

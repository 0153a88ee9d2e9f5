"""Whether a kernel for Hopper takes all chunks of pairs in one launch, and merges one beside the next."""

from functools import lru_cache

import torch

from fsa_core.kernels import hopper
from fsa_core.problem import Problem


def chunk_buffers(problem: Problem, device: torch.device, most_keys: int, min_bytes: int) -> int:
    """In how many buffers the chunks of pairs take turns: more than one if the kernels for Hopper take them.

    That is if blocks have up to ``most_keys`` keys, and all partials at least ``min_bytes``.
    """
    p = problem
    partials = p.num_q_tokens * max(p.index_heads, p.num_kv_heads) * p.num_slots * p.heads_per_pair
    is_long = partials * p.value_dim * p.dtype.itemsize >= min_bytes
    takes = is_long and p.block_size <= most_keys and hopper.runs_on(device)
    return _buffers_on_hopper(p) if takes else 1


@lru_cache(maxsize=1024)
def _buffers_on_hopper(problem: Problem) -> int:
    from fsa_core.kernels.hopper_chunks import BUFFERS
    from fsa_core.kernels.hopper_tiles import multiplies

    return BUFFERS.value if multiplies(problem) else 1

"""Where the tokens of packed ("varlen") sequences lie, on the device and without synchronising."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Facts about each packed query token, all int64 [num_q_tokens].

    ``sequence``: the sequence it belongs to. ``position``: its place among that sequence's keys,
    ``len_k - len_q + i`` for the i-th query (negative when it comes before the first key).
    ``num_visible_keys``: how many keys, from the first of the sequence, it may see.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    num_visible_keys: torch.Tensor


def place_queries(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_q_tokens: int, *, causal: bool
) -> Placement:
    """Place every query token; ``cu_seqlens_*`` are int32 [num_sequences + 1]."""
    cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    token = torch.arange(num_q_tokens, device=cu_q.device)
    # Bounded by the last sequence, so that offsets that were not validated cannot lead out of memory.
    sequence = torch.searchsorted(cu_q[1:], token, right=True).clamp_(max=cu_q.numel() - 2)
    num_keys = cu_k.diff()[sequence]
    position = token - cu_q[1:][sequence] + num_keys
    visible = (position + 1).clamp(min=0).minimum(num_keys) if causal else num_keys
    return Placement(sequence, position, visible)


def single_sequence(num_tokens: int, device: torch.device) -> torch.Tensor:
    """The ``cu_seqlens`` of one sequence that has all the tokens: int32 [2], not to be written to."""
    if device.type != "cuda":
        return _new_single_sequence(num_tokens, device)
    # One made within a graph is filled when the graph runs, and one used there must live as long as it.
    if torch.cuda.is_current_stream_capturing():
        return _new_single_sequence(num_tokens, device)
    # By stream, so that what fills it comes before whoever reads it.
    # Its number is asked for as Triton does: to make a torch.cuda.Stream takes the host ten times as long.
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    return _kept_single_sequence(num_tokens, device, stream)


@lru_cache(maxsize=256)
def _kept_single_sequence(num_tokens: int, device: torch.device, stream: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return _new_single_sequence(num_tokens, device)


def _new_single_sequence(num_tokens: int, device: torch.device) -> torch.Tensor:
    # Computed on the device, in one launch: copying a list there would synchronise.
    if num_tokens == 0:
        return torch.zeros(2, dtype=torch.int32, device=device)
    return torch.arange(0, num_tokens + 1, num_tokens, dtype=torch.int32, device=device)


def uploaded(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on ``device``, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def sequence_starts(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ``cu_seqlens`` of a call, int32 [num_sequences + 1]; one that is None becomes one sequence.

    One tensor for both where both are left out and there are as many keys as queries: each costs a launch.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None and q.shape[0] == k.shape[0]:
        cu_seqlens_q = cu_seqlens_k = single_sequence(q.shape[0], q.device)
    if cu_seqlens_q is None:
        cu_seqlens_q = single_sequence(q.shape[0], q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = single_sequence(k.shape[0], k.device)
    return cu_seqlens_q, cu_seqlens_k


def row_starts(cu_seqlens_q: torch.Tensor, query_block_size: int) -> torch.Tensor:
    """Where each sequence's rows of indices start, int64 [num_sequences + 1], the number of rows last.

    A sequence of n queries has ceil(n / query_block_size) rows.
    """
    return starts_of(-(-cu_seqlens_q.long().diff() // query_block_size))


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each of some runs starts, and the total: int64 [n + 1] of lengths [n]."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int64), (1, 0))


def fresh(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contiguous copy at an address that a packed batch does not shift: BLAS rounds by alignment."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)

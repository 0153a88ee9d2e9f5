"""Where the tokens of a call with a cache belong: worked out on the host, uploaded once, for all layers.

A sequence has a slot in the cache's tensors. In those of keys it is ``capacity`` rows long, in those of
windows ``capacity / stride``, and in that of the last keys before rotation ``kernel_size``, a ring.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from fsa_core.packing import uploaded

# On the host, by numpy: an operation takes a fraction of what it takes torch.
Ints = npt.NDArray[np.int64]

# A sequence with more new tokens is a prompt: its keys are read by tiles of queries, and it costs launches of
# its own. With fewer each token reads its blocks alone.
MOST_DECODED = 32
# Kernels whose addresses are all divisible by 16 bytes are launched faster.
ALIGNED_INTS = 4


@dataclass(frozen=True, slots=True)
class Slot:
    """Rows of a sequence's slot: ``capacity`` keys, a multiple of stride; windows as in NSAConfig."""

    capacity: int
    kernel_size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence with many new tokens, packed from ``start`` to ``end``; its length includes them."""

    sequence: int
    start: int
    end: int
    length: int


# By identity: what is worked out from a step can be looked up by it.
@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The new tokens of a call, packed, and the windows that they complete; on the device.

    On the host are ``starts``, where each sequence's new tokens start, and ``lengths`` with them.


    Rows are those of the cache's tensors with slots and rows flattened, int64:

    ``positions`` [num_tokens + num_windows]: in its sequence, of each token, and then of each window's first.
    ``key_row`` [num_tokens]: where each token goes in the cache. ``kept`` and ``kept_row``: tokens that are
    among the last ``kernel_size`` of their sequence, and where they go in the ring.
    ``window_row`` [num_windows]: where each window goes. ``value_rows``, ``raw_rows`` [num_windows,
    kernel_size]: its tokens in the cache, and, before rotation, in the new tokens followed by the ring.

    ``decoded`` [num_decoded]: the tokens that are no prompt's.

    int32: ``cu_seqlens_q`` and ``cu_seqlens_k`` [num_sequences + 1], the latter of sequences with their new
    tokens, packed; ``seq_lens`` [num_sequences]; ``cu_seqlens_decoded`` as cu_seqlens_q, without prompts.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    num_decoded: int
    is_token_each: bool
    positions: torch.Tensor
    key_row: torch.Tensor
    kept: torch.Tensor
    kept_row: torch.Tensor
    window_row: torch.Tensor
    value_rows: torch.Tensor
    raw_rows: torch.Tensor
    decoded: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_decoded: torch.Tensor

    @property
    def num_windows(self) -> int:
        return len(self.window_row)


def step_of(starts: tuple[int, ...], seen: tuple[int, ...], slot: Slot, device: torch.device) -> Step:
    """The step that adds tokens starts[i] to starts[i + 1] to the ``seen`` ones of each sequence."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _step_of(starts, seen, slot, device, stream)


# All layers of a model ask for one after the other. By stream: a tensor of one is not ready in another.
@lru_cache(maxsize=1)
def _step_of(
    starts: tuple[int, ...], seen: tuple[int, ...], slot: Slot, device: torch.device, stream: int
) -> Step:
    first, before = np.array(starts), np.array(seen)
    counts = np.diff(first)
    after = before + counts
    sequence = np.repeat(np.arange(len(seen)), counts)
    position = np.arange(starts[-1]) + (before - first[:-1])[sequence]
    kept = np.flatnonzero(position >= (after - slot.kernel_size)[sequence])
    is_prompt = counts > MOST_DECODED
    decoded = np.flatnonzero(~is_prompt[sequence])
    windows = _windows(first, before, after, slot)
    rows = {
        "positions": np.concatenate([position, windows.pop("position")]),
        "key_row": sequence * slot.capacity + position,
        "kept": kept,
        "kept_row": (sequence * slot.kernel_size + position % slot.kernel_size)[kept],
        "decoded": decoded,
        **windows,
    }
    cu_seqlens = {
        "cu_seqlens_q": first,
        "cu_seqlens_k": _starts_of(after),
        "seq_lens": after,
        "cu_seqlens_decoded": _starts_of(np.where(is_prompt, 0, counts)),
    }
    lengths = tuple(after.tolist())
    prompts = np.flatnonzero(is_prompt).tolist()
    return Step(
        starts=starts,
        lengths=lengths,
        prompts=tuple(Prompt(i, starts[i], starts[i + 1], lengths[i]) for i in prompts),
        num_decoded=len(decoded),
        is_token_each=bool((counts == 1).all()),
        **_on(device, rows, np.int64),
        **_on(device, cu_seqlens, np.int32),
    )


def _windows(first: Ints, before: Ints, after: Ints, slot: Slot) -> dict[str, Ints]:
    """What ``Step`` says of the windows that sequences of ``after`` keys have and those of ``before`` not."""
    seen, now = (np.maximum(x - slot.kernel_size + slot.stride, 0) // slot.stride for x in (before, after))
    new = _starts_of(now - seen)
    sequence = np.repeat(np.arange(len(before)), now - seen)
    window = np.arange(len(sequence)) + (seen - new[:-1])[sequence]
    of_token, position = sequence[:, None], window[:, None] * slot.stride + np.arange(slot.kernel_size)
    in_ring = first[-1] + of_token * slot.kernel_size + position % slot.kernel_size
    is_new = position >= before[of_token]
    return {
        "position": window * slot.stride,
        "window_row": sequence * (slot.capacity // slot.stride) + window,
        "value_rows": of_token * slot.capacity + position,
        "raw_rows": np.where(is_new, (first[:-1] - before)[of_token] + position, in_ring),
    }


def _starts_of(lengths: Ints) -> Ints:
    """Where each of some runs starts, and the total."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _on(device: torch.device, arrays: dict[str, Ints], dtype: type[np.integer]) -> dict[str, torch.Tensor]:
    """All of them in ``dtype`` on the device, by one copy."""
    sizes = [-(-x.size // ALIGNED_INTS) * ALIGNED_INTS for x in arrays.values()]
    packed = np.zeros(sum(sizes), dtype=dtype)
    for x, begin in zip(arrays.values(), accumulate(sizes, initial=0), strict=False):
        packed[begin : begin + x.size] = x.ravel()
    parts = uploaded(torch.from_numpy(packed), device).split(sizes)
    named = zip(arrays.items(), parts, strict=True)
    return {name: part[: x.size].view(x.shape) for (name, x), part in named}

"""Where the tokens of a call with a cache belong: worked out on the host, uploaded once, for all layers.

A sequence has a slot in the cache's tensors. In those of keys it is ``capacity`` rows long, in those of
windows ``capacity / stride``, and in that of the last keys before rotation ``kernel_size``, a ring.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from fsa_core.nsa.compression import count_windows
from fsa_core.packing import starts_of, uploaded

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
    first, before = torch.tensor(starts), torch.tensor(seen)
    counts = first.diff()
    after = before + counts
    sequences = torch.arange(len(seen))
    sequence = sequences.repeat_interleave(counts)
    position = torch.arange(starts[-1]) + (before - first[:-1])[sequence]
    kept = (position >= (after - slot.kernel_size)[sequence]).nonzero()[:, 0]
    is_prompt = counts > MOST_DECODED
    decoded = (~is_prompt[sequence]).nonzero()[:, 0]
    windows = _windows(first, before, after, slot)
    rows = {
        "positions": torch.cat([position, windows.pop("position")]),
        "key_row": sequence * slot.capacity + position,
        "kept": kept,
        "kept_row": (sequence * slot.kernel_size + position % slot.kernel_size)[kept],
        "decoded": decoded,
        **windows,
    }
    cu_seqlens = {
        "cu_seqlens_q": first,
        "cu_seqlens_k": starts_of(after),
        "seq_lens": after,
        "cu_seqlens_decoded": starts_of(counts.where(~is_prompt, 0)),
    }
    lengths = tuple(after.tolist())
    return Step(
        starts=starts,
        lengths=lengths,
        prompts=tuple(
            Prompt(i, starts[i], starts[i + 1], lengths[i]) for i in is_prompt.nonzero()[:, 0].tolist()
        ),
        num_decoded=len(decoded),
        is_token_each=all(end - start == 1 for start, end in pairwise(starts)),
        **_on(device, rows),
        **_on(device, {name: x.int() for name, x in cu_seqlens.items()}),
    )


def _windows(
    first: torch.Tensor, before: torch.Tensor, after: torch.Tensor, slot: Slot
) -> dict[str, torch.Tensor]:
    """What ``Step`` says of the windows that sequences of ``after`` keys have and those of ``before`` not."""
    seen, now = (count_windows(x, slot.kernel_size, slot.stride) for x in (before, after))
    new = starts_of(now - seen)
    sequence = torch.arange(len(before)).repeat_interleave(new.diff())
    window = torch.arange(len(sequence)) + (seen - new[:-1])[sequence]
    sequence, position = sequence[:, None], window[:, None] * slot.stride + torch.arange(slot.kernel_size)
    in_tail = first[-1] + sequence * slot.kernel_size + position % slot.kernel_size
    is_new = position >= before[sequence]
    return {
        "position": window * slot.stride,
        "window_row": sequence[:, 0] * (slot.capacity // slot.stride) + window,
        "value_rows": sequence * slot.capacity + position,
        "raw_rows": ((first[:-1] - before)[sequence] + position).where(is_new, in_tail),
    }


def _on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one dtype, by one copy."""
    padded = [F.pad(x.flatten(), (0, -x.numel() % ALIGNED_INTS)) for x in tensors.values()]
    parts = uploaded(torch.cat(padded), device).split([len(x) for x in padded])
    named = zip(tensors.items(), parts, strict=True)
    return {name: part[: x.numel()].view(x.shape) for (name, x), part in named}

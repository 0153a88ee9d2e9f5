"""What a layer keeps of the tokens it has seen, so that the next ones can attend to them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fsa_core.errors import refuse
from fsa_core.nsa.config import NSAConfig, checked_size
from fsa_core.nsa.steps import Slot, Step, step_of


@dataclass(frozen=True, slots=True)
class Slots:
    """K and V of all sequences, a slot each: one tensor of a kind, so that one launch reaches them all.

    ``k``, ``v`` [num_sequences, capacity, heads, dim], as attention takes them: keys rotated. ``k_cmp``,
    ``v_cmp`` [num_sequences, capacity / stride, heads, dim]: their windows, likewise. ``k_raw``
    [num_sequences, kernel_size, heads, dim]: the last keys before rotation, key p in place p % kernel_size,
    for the windows that later tokens complete; those of V are in ``v``.

    int32: ``key_starts``, ``window_starts`` [num_sequences], the first row of each slot, slots flattened;
    ``page_table`` [num_sequences, capacity / block_size], slots as pages of a block.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    k_raw: torch.Tensor
    key_starts: torch.Tensor
    window_starts: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def of(
        cls, num_sequences: int, capacity: int, config: NSAConfig, k: torch.Tensor, v: torch.Tensor
    ) -> "Slots":
        """Empty ones for keys and values like ``k`` and ``v`` [num_tokens, heads, dim].

        Written to within inference mode and out of it, which tensors of inference mode could not be.
        """

        def rows(x: torch.Tensor, count: int) -> torch.Tensor:
            return x.new_empty(num_sequences, count, *x.shape[1:])

        def starts(count: int) -> torch.Tensor:
            return torch.arange(0, num_sequences * count, count, dtype=torch.int32, device=k.device)

        num_windows, num_blocks = capacity // config.stride, capacity // config.block_size
        with torch.inference_mode(False):
            return cls(
                k=rows(k, capacity),
                v=rows(v, capacity),
                k_cmp=rows(k, num_windows),
                v_cmp=rows(v, num_windows),
                k_raw=rows(k, config.kernel_size),
                key_starts=starts(capacity),
                window_starts=starts(num_windows),
                page_table=starts(num_blocks)[:, None]
                + torch.arange(num_blocks, dtype=torch.int32, device=k.device),
            )

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def copy_from(self, slots: "Slots") -> None:
        """Take over the rows of shorter slots."""
        pairs = (
            (self.k, slots.k),
            (self.v, slots.v),
            (self.k_cmp, slots.k_cmp),
            (self.v_cmp, slots.v_cmp),
            (self.k_raw, slots.k_raw),
        )
        for new, old in pairs:
            new[:, : old.shape[1]] = old


class _Kind(NamedTuple):
    """What the tokens of a cache have in common."""

    config: NSAConfig
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class NSACache:
    """The sequences of a batch in one layer. A model has one for every layer.

    Memory: for each sequence K and V of ``capacity`` tokens, and 1 / stride of them again for their windows,
    whatever its own length; more while it grows. ``capacity`` at least doubles when the longest sequence
    outgrows it.

    ``num_sequences``: at least 1, or InputError.
    """

    def __init__(self, num_sequences: int) -> None:
        self._lengths = (0,) * checked_size("num_sequences", num_sequences)
        self._slots: Slots | None = None
        self._kind: _Kind | None = None

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen of each sequence."""
        return list(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return 0 if self._slots is None else self._slots.capacity

    @property
    def slots(self) -> Slots:
        """Valid until the next ``begin``, which may need longer ones."""
        if self._slots is None:
            raise IndexError("nothing was appended yet")
        return self._slots

    def forget(self, sequence: int) -> None:
        """Empty one sequence's slot: the next tokens given for it begin another sequence there.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence is {sequence}: expected one of the {self.num_sequences} of the cache")
        self._lengths = (*self._lengths[:sequence], 0, *self._lengths[sequence + 1 :])

    def begin(self, starts: tuple[int, ...], k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> Step:
        """Make room for more tokens, of sequence i from starts[i] to starts[i + 1].

        k, v: [num_tokens, heads, dim], like which they are. Nothing that was seen changes before ``commit``:
        until then what is appended lies behind it, where the next ``begin`` writes anew.

        Raises:
            InputError: ``config`` is not that of the tokens seen, or heads, dims, dtype or device are others.
        """
        self._check_kind(_Kind(config, k.shape[1], k.shape[2], v.shape[2], k.dtype, k.device))
        counts = (end - start for start, end in pairwise(starts))
        longest = max(seen + new for seen, new in zip(self._lengths, counts, strict=True))
        if self._slots is None or longest > self.capacity:
            # Whole blocks: attention reads a slot as a run of pages of one block.
            capacity = -(-max(longest, 2 * self.capacity) // config.block_size) * config.block_size
            grown = Slots.of(self.num_sequences, capacity, config, k, v)
            if self._slots is not None:
                grown.copy_from(self._slots)
            self._slots = grown
        return step_of(
            starts, self._lengths, Slot(self.capacity, config.kernel_size, config.stride), k.device
        )

    def append(self, step: Step, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add the tokens of ``step``: [num_tokens, heads, dim], ``k`` rotated."""
        self.slots.k.flatten(0, 1).index_copy_(0, step.key_row, k)
        self.slots.v.flatten(0, 1).index_copy_(0, step.key_row, v)

    def append_windows(self, step: Step, k_cmp: torch.Tensor, v_cmp: torch.Tensor) -> None:
        """Add the windows that ``step`` completes: [num_windows, heads, dim], ``k_cmp`` rotated."""
        self.slots.k_cmp.flatten(0, 1).index_copy_(0, step.window_row, k_cmp)
        self.slots.v_cmp.flatten(0, 1).index_copy_(0, step.window_row, v_cmp)

    def commit(self, step: Step, k_raw: torch.Tensor) -> None:
        """Count the tokens of ``step`` as seen, once nothing can fail any more.

        k_raw: [num_tokens, heads, dim], their keys before rotation. They overwrite keys that windows of the
        same tokens, were these given again, would have to read.
        """
        kept = k_raw if len(step.kept) == len(k_raw) else k_raw[step.kept]
        self.slots.k_raw.flatten(0, 1).index_copy_(0, step.kept_row, kept)
        self._lengths = step.lengths

    def _check_kind(self, kind: _Kind) -> None:
        if kind == self._kind:
            return
        if self._kind is not None and any(self._lengths):
            for name, got, expected in zip(_Kind._fields, kind, self._kind, strict=True):
                if got != expected:
                    refuse("INVALID_CACHE", "cache", name, expected, f"{got}, that of this call")
        # Of a cache that holds no token nothing is lost.
        self._kind, self._slots = kind, None

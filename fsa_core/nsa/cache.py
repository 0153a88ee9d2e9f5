"""What a layer keeps of the tokens it has seen, so that the next ones can attend to them."""

import torch

from fsa_core.nsa.compression import CompressionState


class GrowingRows:
    """Rows appended one after the other to one tensor, whose storage doubles when it is full."""

    def __init__(self) -> None:
        self._storage: torch.Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> torch.Tensor:
        """A view on all rows so far, contiguous; valid until the next append."""
        if self._storage is None:
            raise IndexError("nothing was appended yet")
        return self._storage[: self._length]

    def append(self, rows: torch.Tensor) -> None:
        """Copy ``rows`` [n, ...] to the end; all appends are of one shape, dtype and device."""
        length = self._length + len(rows)
        if self._storage is None or length > len(self._storage):
            grown = rows.new_empty(max(length, 2 * self._length), *rows.shape[1:])
            if self._storage is not None:
                grown[: self._length] = self.rows
            self._storage = grown
        self._storage[self._length : length] = rows
        self._length = length


class SequenceCache:
    """One sequence in one layer: K, V, their compressed forms, and what their next windows need.

    ``k`` and ``k_cmp`` hold keys as attention takes them, rotated; the compression states hold them before.
    """

    def __init__(self) -> None:
        self.k = GrowingRows()
        self.v = GrowingRows()
        self.k_cmp = GrowingRows()
        self.v_cmp = GrowingRows()
        self.k_state: CompressionState | None = None
        self.v_state: CompressionState | None = None


class NSACache:
    """The sequences of a batch in one layer. A model has one for every layer.

    Memory for each token: K and V, and 1 / stride of them again for the compressed ones; up to twice that
    while storage grows.
    """

    def __init__(self, num_sequences: int) -> None:
        self.sequences = [SequenceCache() for _ in range(num_sequences)]

    @property
    def lengths(self) -> list[int]:
        """Tokens seen of each sequence."""
        return [len(sequence.k) for sequence in self.sequences]

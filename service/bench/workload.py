"""The requests a benchmark sends: random tensors, and block selections that look like a model's."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from service.client import BlockIndices, Dense, Pattern

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One causal sequence of ``tokens`` queries and keys; ``slots`` 0 is dense attention."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    slots: int
    dtype: str

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and out, and of the block indices: what a request moves over the wire."""
        return self.request_bytes + self._bytes_of(self.q_heads)

    @property
    def request_bytes(self) -> int:
        """Bytes of q, k, v and of the block indices."""
        return self._bytes_of(self.q_heads + 2 * self.kv_heads) + self.tokens * self.kv_heads * self.slots * 4

    def _bytes_of(self, num_heads: int) -> int:
        itemsize: int = DTYPES[self.dtype].itemsize
        return self.tokens * num_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class Request:
    """The tensors of one request."""

    q: NDArray[np.generic]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    pattern: Pattern


def make_request(shape: Shape, seed: int) -> Request:
    """A request that depends on ``shape`` and ``seed`` alone."""
    rng = np.random.default_rng(seed)

    def normal(heads: int) -> NDArray[np.generic]:
        values = rng.standard_normal((shape.tokens, heads, shape.head_dim), np.float32)
        return values.astype(DTYPES[shape.dtype])

    q, k, v = normal(shape.q_heads), normal(shape.kv_heads), normal(shape.kv_heads)
    pattern = BlockIndices(select_blocks(shape, rng), shape.block_size) if shape.slots else Dense()
    return Request(q, k, v, pattern)


def select_blocks(shape: Shape, rng: np.random.Generator) -> NDArray[np.int32]:
    """int32 [kv_heads, tokens, slots], rows ascending with -1 at their ends.

    As selection in NSA does: the block that a token is in, the first block, and for the rest a random
    one from each of ``slots - 2`` equal parts of what lies between.
    """
    size = (shape.kv_heads, shape.tokens, shape.slots)
    indices = np.full(size, -1, np.int32)
    own = np.arange(shape.tokens, dtype=np.int32) // shape.block_size
    indices[..., 0] = own
    if shape.slots > 1:
        indices[..., 1] = np.where(own > 0, 0, -1)
    if shape.slots > 2:
        parts = shape.slots - 2
        between = np.maximum(own - 1, 0)[:, None].astype(np.int64)
        part = np.arange(parts)
        first, end = 1 + part * between // parts, 1 + (part + 1) * between // parts
        chosen = first + (rng.random((shape.kv_heads, shape.tokens, parts)) * (end - first)).astype(np.int64)
        indices[..., 2:] = np.where(end > first, chosen, -1)
    unused = np.iinfo(np.int32).max
    indices[indices < 0] = unused
    indices.sort(axis=-1)
    indices[indices == unused] = -1
    return indices

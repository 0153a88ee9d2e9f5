"""Which keys each query token may attend to."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BlockIndices:
    """Selected KV blocks.

    ``indices``: int32 [1 | kv heads | q heads, rows, slots], numpy or torch: ids of KV blocks inside
    the row's own sequence, unique in a row, in any order, -1 in unused slots. Rows in ascending order
    are validated fastest. ``block_size``: 16, 32, 64, 128 or 256 keys. With ``query_block_size`` > 1,
    that many queries of a sequence share a row, counted from its first query.
    """

    indices: Any
    block_size: int
    query_block_size: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """Every key: full attention."""


Pattern = BlockIndices | Dense

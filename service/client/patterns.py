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
class BlockCsr:
    """Selected KV blocks, each row with a count of its own: dynamic budgets, FlashInfer's BSR.

    ``indices``: int32 [ids], ids of blocks by the rules of ``BlockIndices``. ``offsets``: int32 [1 | kv heads
    | q heads, rows + 1], where each row of each head starts in ``indices`` and where the head's last one
    ends, which is where the next head's first starts; FlashInfer's indptr is ``offsets[0]``.
    """

    offsets: Any
    indices: Any
    block_size: int
    query_block_size: int = 1


@dataclass(frozen=True, slots=True)
class BlockMask:
    """Marked blocks, a row for ``query_block_size`` queries of a sequence: SeerAttention, XAttention.

    ``mask``: bool [1 | kv heads | q heads, rows, blocks of the longest sequence's keys]. Columns are blocks
    of the row's own sequence; none is marked past its end or, when causal, past the row's last query.
    """

    mask: Any
    block_size: int
    query_block_size: int


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """Columns that all queries see, and diagonals: MInference. Needs causal.

    ``vertical``: int32 [1 | kv heads | q heads, columns], positions of keys in their sequence; ``slash``:
    int32 [heads of vertical, diagonals], distances from a query back to its key; -1 in unused places. Each
    token attends the whole blocks, up to itself, that hold one of its keys.
    """

    vertical: Any
    slash: Any
    block_size: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Every key: full attention."""


@dataclass(frozen=True, slots=True)
class Select:
    """The server chooses, as Native Sparse Attention does with mean-compressed keys. Needs causal.

    ``kernel_size``, ``stride``: window i of a sequence, whose keys become one, covers [i * stride,
    i * stride + kernel_size). ``block_size``: 16, 32, 64, 128 or 256 keys; it and ``kernel_size`` are
    multiples of ``stride``. ``top_k``: blocks that a query attends to at most, among them the first
    ``num_first_blocks`` and the ``num_local_blocks`` up to its own. ``top_p``: no more once the blocks hold
    this share of the row's importance; ``min_share``: none that holds less.

    ``gates``: [q tokens, q heads, 3] in the dtype of q, of the compressed, the selected and the
    sliding-window branch, whose sum is then the answer, without an lse; None: selected attention alone.
    ``window``: keys that the sliding window sees; counts with gates only. ``return_block_indices``: ask for
    what was chosen. The defaults are the paper's (arXiv 2502.11089).
    """

    kernel_size: int = 32
    stride: int = 16
    block_size: int = 64
    top_k: int = 16
    num_first_blocks: int = 1
    num_local_blocks: int = 2
    top_p: float | None = None
    min_share: float | None = None
    gates: Any = None
    window: int = 512
    return_block_indices: bool = False


Pattern = BlockIndices | BlockCsr | BlockMask | VerticalSlash | Dense | Select

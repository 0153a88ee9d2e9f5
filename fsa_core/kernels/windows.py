"""What the kernels over compressed keys share: where windows lie, and which of them a query sees.

Keys as they are, are windows of one key at stride 1: sliding-window attention has the same kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.problem import Problem
from fsa_core.sizes import padded_dim


@dataclass(frozen=True, slots=True)
class Windows:
    """Window i of a sequence covers its keys [i * stride, i * stride + kernel_size); only whole ones exist.

    cu_seqlens_q, cu_seqlens_k (of the keys before compression) and cu_seqlens_cmp (of the windows) are int32
    [num_sequences + 1]. Of the windows whose last key is not after a query it sees the last ``reach``, or all
    if that is 0.

    What walks query tiles takes from cu_seqlens_cmp only where each sequence's windows start (its last number
    may be missing), and from cu_seqlens_k how many keys it has: there may be gaps behind the windows of a
    sequence, as in a cache. Gradients of keys want them packed.
    """

    kernel_size: int
    stride: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    cu_seqlens_cmp: torch.Tensor
    reach: int = 0

    @property
    def starts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.cu_seqlens_cmp

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What is the same for calls of other tensors."""
        return self.kernel_size, self.stride, self.reach

    @classmethod
    def of(cls, sizes: tuple[int, int, int], starts: Sequence[torch.Tensor]) -> "Windows":
        kernel_size, stride, reach = sizes
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp = starts
        return cls(kernel_size, stride, cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp, reach)


@dataclass(frozen=True, slots=True)
class RowShares:
    """What makes a score s of a row a probability: exp2(s * log2(e) * softmax_scale - max) * share.

    Both float32 [num_q_heads, num_q_tokens]. The maximum is kept apart from the sum, whose inverse ``share``
    is: scores that are whole numbers in base 2 then have exact weights, and what ties in them, ties.
    """

    max: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """``tokens`` tokens with ``heads`` query heads of a KV head, or of one of its ``parts``, in ``rows``."""

    tokens: int
    heads: int
    parts: int
    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows and keys of a step, and how they are walked."""

    rows: int
    keys: int
    num_warps: int = 8
    num_stages: int = 2

    def tile(self, group_size: int) -> Tile:
        """As many whole tokens as the rows hold."""
        parts = -(-group_size // self.rows)
        heads = -(-group_size // parts)
        return Tile(self.rows // heads, heads, parts, self.rows, self.keys, self.num_warps, self.num_stages)

    def full_tile(self, group_size: int) -> Tile:
        """Of rows that are all taken, whatever the group: of a group of five with one head, of six with two.

        Where a thread's rows lie then differs by constants.
        """
        heads = math.gcd(group_size, self.rows)
        parts, tokens = group_size // heads, self.rows // heads
        return Tile(tokens, heads, parts, self.rows, self.keys, self.num_warps, self.num_stages)


def gradient_shape(problem: Problem, narrow: TileShape, wide: TileShape) -> TileShape:
    """Of 16-bit numbers: narrow where 256 bytes hold those of a row, or wide.

    float32, multiplied in three parts, takes shared memory for each part.
    """
    p = problem
    width = padded_dim(max(p.head_dim, p.value_dim))
    if p.dtype.itemsize == 2:
        return narrow if width <= 128 else wide
    return TileShape(2 * wide.rows, 2 * wide.keys) if width <= 64 else TileShape(32, 4096 // width)


def walk_constants(problem: Problem, windows: Windows, tile: Tile) -> dict[str, int]:
    """What is compiled into the kernels that walk tiles of rows and tiles of windows."""
    p = problem
    return {
        "NUM_Q_HEADS": p.num_q_heads, "NUM_KV_HEADS": p.num_kv_heads, "GROUP_SIZE": p.group_size,
        "HEADS": tile.heads, "PARTS": tile.parts, "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim,
        "HEAD_DIM_PADDED": padded_dim(p.head_dim), "VALUE_DIM_PADDED": padded_dim(p.value_dim),
        "KERNEL_SIZE": windows.kernel_size, "STRIDE": windows.stride, "REACH": windows.reach,
        "TOKENS": tile.tokens, "ROWS": tile.rows, "KEYS": tile.keys, "STAGES": tile.num_stages,
    }  # fmt: skip


@triton.jit
def last_tiles_first(
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    cu_seqlens_cmp_ptr,
    num_sequences,
    search_steps,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Of this program's tile: its first token and its sequence's end, the position of packed token 0, and the
    sequence's first window and how many it has.

    The last tiles see most: begun last, they would be what all others wait for.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_k_ptr + sequence)
    window_start = tl.load(cu_seqlens_cmp_ptr + sequence)
    # Not where the next sequence's windows start: there may be a gap before those.
    num_windows = visible_windows(k_length - 1, KERNEL_SIZE, STRIDE)
    return first, q_end, k_length - q_end, window_start, num_windows


@triton.jit
def visible_windows(position, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """How many windows, from the first, end at or before ``position``."""
    return tl.maximum(position + 1 - KERNEL_SIZE + STRIDE, 0) // STRIDE


@triton.jit
def first_position(window, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The first position from which ``window`` is among the visible ones: that of its last key."""
    return window * STRIDE + (KERNEL_SIZE - 1)


@triton.jit
def seeing_tokens(
    first_window,
    last_window,
    q_position,
    q_length,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    REACH: tl.constexpr,
):
    """Tokens of a sequence that see some of the windows from the first to the last, and that see all of them.

    Returns the first of either, then the ends of both; tokens are counted from the sequence's first, whose
    position is ``q_position``.
    """
    start = tl.maximum(first_position(first_window, KERNEL_SIZE, STRIDE) - q_position, 0)
    start_all = first_position(last_window, KERNEL_SIZE, STRIDE) - q_position
    end_all, end = q_length, q_length
    if REACH:
        end_all = tl.minimum(first_position(first_window + REACH, KERNEL_SIZE, STRIDE) - q_position, q_length)
        end = tl.minimum(first_position(last_window + REACH, KERNEL_SIZE, STRIDE) - q_position, q_length)
    return start, start_all, end_all, end


@triton.jit
def split_steps(start, start_all, end_all, end, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """Steps of TOKENS tokens from ``start`` to ``end``, and which of them are this split's.

    Returns how many there are; of those whose tokens see all windows the split's last one, and how many it
    has: every SPLITS-th from there back; and its range of those at both ends: those behind the others, then,
    counted on, those before them.

    Most tiles of a sequence end with the same tokens. Walked back from there by all splits together, rows are
    read by many programs at a time, and from memory once.
    """
    num_steps = tl.cdiv(tl.maximum(end - start, 0), TOKENS)
    first_whole = tl.minimum(tl.cdiv(tl.maximum(start_all - start, 0), TOKENS), num_steps)
    end_whole = tl.maximum(tl.maximum(end_all - start, 0) // TOKENS, first_whole)
    last_whole = end_whole - 1 - split
    num_whole = tl.cdiv(tl.maximum(last_whole + 1 - first_whole, 0), SPLITS)
    last_cut = num_steps + first_whole
    cut_steps = tl.cdiv(last_cut - end_whole, SPLITS)
    start_cut = end_whole + split * cut_steps
    end_cut = tl.minimum(start_cut + cut_steps, last_cut)
    return num_steps, last_whole, num_whole, start_cut, end_cut

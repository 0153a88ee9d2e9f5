"""Compression of K or V: every window of keys becomes one, by a mean or by something learned (equation 7).

Window i of a sequence covers its tokens [i * stride, i * stride + kernel_size); only whole windows count,
and none crosses sequences. Source: Native Sparse Attention, arXiv 2502.11089: the MLP with intra-block
position is the paper's own, the others are what public implementations of it offer.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fsa_core.api import resolve_backend
from fsa_core.errors import refuse, refuse_bad_starts, refuse_value
from fsa_core.nsa.config import checked_size
from fsa_core.validation import check_ints, check_tensor


def count_windows(num_keys: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """How many whole windows lie within the first ``num_keys`` keys; any shape."""
    return (num_keys.clamp(min=kernel_size - stride) - kernel_size) // stride + 1


def compressed_cu_seqlens(cu_seqlens: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """Where each sequence's windows start, and their total: int32 [num_sequences + 1]."""
    windows = count_windows(cu_seqlens.long().diff(), kernel_size, stride)
    return F.pad(windows.cumsum(0), (1, 0)).int()


class Compression(nn.Module, ABC):
    """Windows of tokens pooled to one token each; subclasses say how. Differentiable.

    Sizes that are no integers of at least 1, or do not fit, are refused by InputError, reason INVALID_<NAME>.
    """

    def __init__(self, kernel_size: int, stride: int, *heads_and_dim: int) -> None:
        """``heads_and_dim``: those that x must have, as far as they matter."""
        super().__init__()
        self._heads_and_dim = list(heads_and_dim)
        self.kernel_size = checked_size("kernel_size", kernel_size)
        self.stride = checked_size("stride", stride)
        if self.stride > self.kernel_size:
            refuse_value("stride", self.stride, f"from 1 to the kernel size, {self.kernel_size}")

    @abstractmethod
    def pool(self, windows: torch.Tensor) -> torch.Tensor:
        """[..., heads, dim] from windows [..., heads, head_dim, kernel_size]."""

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Compress packed sequences.

        x: [num_tokens, heads, head_dim]; cu_seqlens: int32 [num_sequences + 1], None: one sequence. Returns
        [num_windows, heads, dim] in x's dtype, the windows of the first sequence first;
        ``compressed_cu_seqlens`` says where each sequence's start. Bitwise the same in any company, unless a
        gradient is asked for. Reads cu_seqlens, which synchronises on CUDA, but not if given as numbers.
        Raises InputError for x or cu_seqlens of other shapes, and for cu_seqlens that are not x's.
        """
        check_tensor("x", x, "[num_tokens, heads, head_dim]", 3)
        expected = self._heads_and_dim
        got = list(x.shape[1 : 1 + len(expected)])
        if got != expected:
            refuse("INVALID_HEADS", "x", "heads and dim", got, f"{expected}, those of the parameters")
        parts = self._split(x, _lengths(x, cu_seqlens))
        pooled = [self.pool_sequences(part) for part in parts if part.shape[1] >= self.kernel_size]
        if not pooled:
            pooled = [self.pool(x.new_empty(0, *x.shape[1:], self.kernel_size))]
        # Under autocast parameters are wider than x.
        return (pooled[0] if len(pooled) == 1 else torch.cat(pooled)).to(x.dtype)

    def pool_sequences(self, x: torch.Tensor) -> torch.Tensor:
        """[windows of all, heads, dim] from x [num_sequences, length, heads, head_dim], a window at least."""
        return self.pool(x.unfold(1, self.kernel_size, self.stride)).flatten(0, 1)

    def _split(self, x: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        """What is pooled at once, each [num_sequences, length, heads, head_dim], sequences of one length.

        By split, whose gradient is one concatenation however many sequences there are. A sequence alone has
        its sums in the same order in any company. Where a gradient is asked for, equal ones beside each other
        go together: launches take the host longer than the device their work.
        """
        if len(lengths) == 1:
            return [x[None]]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        runs = [list(run) for _, run in itertools.groupby(lengths)] if trains else [[n] for n in lengths]
        parts = x.split([sum(run) for run in runs])
        return [part.unflatten(0, (len(run), run[0])) for part, run in zip(parts, runs, strict=True)]

    def at(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compress windows whose tokens lie anywhere, all at once: those that the next tokens complete, say.

        x: [num_rows, heads, head_dim]; rows: int64 [num_windows, kernel_size], at least one, which rows of
        x its tokens are, in order. Returns [num_windows, heads, dim] in x's dtype. Synchronises nothing.
        """
        return self.pool(x[rows].permute(0, 2, 3, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class MeanCompression(Compression):
    """The mean of a window's tokens; nothing is learned."""

    def pool(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.mean(-1)

    def pool_sequences(self, x: torch.Tensor) -> torch.Tensor:
        # Windows of whole strides; others have tokens that share a run and not their windows.
        trains = torch.is_grad_enabled() and x.requires_grad
        sizes = self.kernel_size, self.stride
        if trains and (self.kernel_size % self.stride == 0 or _runs_kernels(x)):
            means: torch.Tensor = _Means.apply(x, *sizes)  # type: ignore[no-untyped-call]
        elif _runs_kernels(x):
            means = _means(x, *sizes)
        else:
            return super().pool_sequences(x)
        return means.flatten(0, 1)


def _runs_kernels(x: torch.Tensor) -> bool:
    # Kernels add in float32.
    return x.dtype != torch.float64 and x.numel() > 0 and resolve_backend("auto", x.device) == "triton"


def _means(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    # Triton is imported when a kernel is first needed.
    from fsa_core.kernels.means import means

    return means(x.contiguous(), kernel_size, stride)


class _Means(torch.autograd.Function):
    """The means of windows; unfold's own gradient takes ten times as long, a token at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
        ctx.sizes = x.shape[1], kernel_size, stride
        if _runs_kernels(x):
            return _means(x, kernel_size, stride)
        return x.unfold(1, kernel_size, stride).mean(-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_x: torch.Tensor = _Spread.apply(grad, *ctx.sizes)  # type: ignore[no-untyped-call]
        return grad_x, None, None


class _Spread(torch.autograd.Function):
    """The gradient of means, which is linear: its own gradient is their means again."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, length: int, kernel_size: int, stride: int) -> torch.Tensor:
        ctx.sizes = kernel_size, stride
        if _runs_kernels(grad):
            from fsa_core.kernels.means import spread

            return spread(grad.contiguous(), length, kernel_size, stride)
        num_windows, num_runs = grad.shape[1], kernel_size // stride
        share = grad.to(torch.promote_types(grad.dtype, torch.float32)) / kernel_size
        # All tokens of a run of ``stride`` lie in the same windows.
        runs = share.new_zeros(grad.shape[0], num_windows + num_runs - 1, *grad.shape[2:])
        for run in range(num_runs):
            runs[:, run : run + num_windows] += share
        tokens = runs.to(grad.dtype)[:, :, None].expand(-1, -1, stride, -1, -1).flatten(1, 2)
        rest = length - tokens.shape[1]
        return F.pad(tokens, (0, 0, 0, 0, 0, rest)) if rest else tokens

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad: torch.Tensor = _Means.apply(grad_x, *ctx.sizes)  # type: ignore[no-untyped-call]
        return grad, None, None, None


class WeightedCompression(Compression):
    """The sum of a window's tokens, each times a learned weight of its place in the window.

    Parameters: ``weight`` [heads, kernel_size], 1 / kernel_size at the start: a mean.
    """

    def __init__(self, kernel_size: int, stride: int, num_heads: int) -> None:
        num_heads = checked_size("num_heads", num_heads)
        super().__init__(kernel_size, stride, num_heads)
        self.weight = nn.Parameter(torch.full((num_heads, self.kernel_size), 1 / self.kernel_size))

    def pool(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...hdk,hk->...hd", windows, self.weight)


class LinearCompression(Compression):
    """A learned linear map of the whole window.

    Parameters: ``weight`` [heads, kernel_size, head_dim, head_dim] and ``bias`` [heads, head_dim], a mean at
    the start. The bias is all that an intra-block position could add to a linear map.
    """

    def __init__(self, kernel_size: int, stride: int, num_heads: int, head_dim: int) -> None:
        num_heads, head_dim = checked_size("num_heads", num_heads), checked_size("head_dim", head_dim)
        super().__init__(kernel_size, stride, num_heads, head_dim)
        mean = torch.eye(head_dim) / self.kernel_size
        self.weight = nn.Parameter(mean.repeat(num_heads, self.kernel_size, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def pool(self, windows: torch.Tensor) -> torch.Tensor:
        return _per_head(windows, self.weight, self.bias)


class MLPCompression(Compression):
    """A learned MLP of the whole window, whose tokens know their place: the paper's choice.

    Parameters: ``position`` [heads, kernel_size, head_dim], added to a window's tokens; ``weight_in``
    [heads, kernel_size, head_dim, hidden_dim], ``bias_in`` [heads, hidden_dim], GELU, ``weight_out``
    [heads, hidden_dim, head_dim], ``bias_out`` [heads, head_dim].
    """

    def __init__(
        self, kernel_size: int, stride: int, num_heads: int, head_dim: int, hidden_dim: int | None = None
    ) -> None:
        num_heads, head_dim = checked_size("num_heads", num_heads), checked_size("head_dim", head_dim)
        super().__init__(kernel_size, stride, num_heads, head_dim)
        kernel_size = self.kernel_size
        hidden_dim = checked_size("hidden_dim", 4 * head_dim if hidden_dim is None else hidden_dim)
        self.position = nn.Parameter(0.02 * torch.randn(num_heads, kernel_size, head_dim))
        fan_in = kernel_size * head_dim
        self.weight_in = nn.Parameter(
            torch.randn(num_heads, kernel_size, head_dim, hidden_dim) / math.sqrt(fan_in)
        )
        self.bias_in = nn.Parameter(torch.zeros(num_heads, hidden_dim))
        self.weight_out = nn.Parameter(torch.randn(num_heads, hidden_dim, head_dim) / math.sqrt(hidden_dim))
        self.bias_out = nn.Parameter(torch.zeros(num_heads, head_dim))

    def pool(self, windows: torch.Tensor) -> torch.Tensor:
        hidden = _per_head(windows + self.position.transpose(1, 2), self.weight_in, self.bias_in)
        return torch.einsum("...hf,hfe->...he", F.gelu(hidden), self.weight_out) + self.bias_out


def _lengths(x: torch.Tensor, cu_seqlens: torch.Tensor | Sequence[int] | None) -> list[int]:
    if cu_seqlens is None:
        return [x.shape[0]]
    starts = cu_seqlens
    if isinstance(starts, torch.Tensor):
        check_ints("cu_seqlens", starts, "[num_sequences + 1]", 1, None)
        starts = starts.tolist()
    if len(starts) < 2:
        refuse("INVALID_CU_SEQLENS", "cu_seqlens", "length", len(starts), "at least 2: a start and an end")
    refuse_bad_starts("cu_seqlens", starts, x.shape[0])
    return [end - start for start, end in itertools.pairwise(starts)]


def _per_head(windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # Sums run over letters in alphabetical order: in this one the weights are read as they lie, not copied.
    return torch.einsum("...hdc,hcde->...he", windows, weight) + bias

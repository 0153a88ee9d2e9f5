"""The sizes of the operator, checked when they are set."""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from fsa_core.errors import refuse_value
from fsa_core.problem import BLOCK_SIZES, MAX_SLOTS
from fsa_core.validation import as_float

# What fits an int64, as positions of keys have it.
MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class NSAConfig:
    """How keys are compressed, blocks selected and the window cut; sizes are in keys.

    ``kernel_size`` and ``stride`` (the paper's l and d): window i of a sequence covers its keys
    [i * stride, i * stride + kernel_size). ``kernel_size`` and ``block_size`` are multiples of ``stride``.
    ``block_size`` (l'): keys in a selected block, 16, 32, 64, 128 or 256.
    ``top_k`` (n): blocks a token selects at most, the forced ones among them: the first ``num_first_blocks``
    of the sequence, and ``num_local_blocks`` up to the token's own.
    ``top_p``: stop before ``top_k``, as soon as the blocks chosen hold this share of the row's importance.
    ``min_share``: leave out blocks, if not forced, that hold less than this share.
    ``window`` (w): the last keys, the token's own among them, that sliding-window attention sees.

    The defaults are the paper's. Raises InputError, reason INVALID_<FIELD>.
    """

    kernel_size: int = 32
    stride: int = 16
    block_size: int = 64
    top_k: int = 16
    num_first_blocks: int = 1
    num_local_blocks: int = 2
    window: int = 512
    top_p: float | None = None
    min_share: float | None = None

    def __post_init__(self) -> None:
        least = {"num_first_blocks": 0, "num_local_blocks": 0}
        for name in (f.name for f in fields(self) if f.name not in ("top_p", "min_share")):
            object.__setattr__(self, name, checked_size(name, getattr(self, name), least.get(name, 1)))
        for name in ("kernel_size", "block_size"):
            if getattr(self, name) % self.stride:
                refuse_value(name, getattr(self, name), f"a multiple of stride, {self.stride}")
        if self.block_size not in BLOCK_SIZES:
            refuse_value("block_size", self.block_size, f"one of {', '.join(map(str, BLOCK_SIZES))}")
        forced = self.num_first_blocks + self.num_local_blocks
        if not forced <= self.top_k <= MAX_SLOTS:
            refuse_value("top_k", self.top_k, f"from {forced}, the number of forced blocks, to {MAX_SLOTS}")
        for name in ("top_p", "min_share"):
            share = getattr(self, name)
            if share is not None and not (isinstance(share, Real) and 0 < as_float(share) <= 1):
                refuse_value(name, share, "above 0 and at most 1, or None")

    @property
    def has_budget(self) -> bool:
        """Whether something else than ``top_k`` may end a row."""
        return self.ending_share is not None or self.min_share is not None

    @property
    def ending_share(self) -> float | None:
        """``top_p``, but for 1, which ends no row: only rounding would say which of the least blocks."""
        return self.top_p if self.top_p is not None and self.top_p < 1 else None


def checked_size(name: str, value: Any, least: int = 1, most: int = MAX_SIZE) -> int:
    """A plain integer; InputError unless it is one, of whatever kind, from ``least`` to ``most``."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not least <= value <= most:
        refuse_value(name, value, f"an integer of at least {least}, at most {most}")
    # NumPy's integers, say, would be told apart from Python's where kernels are looked up.
    return int(value)

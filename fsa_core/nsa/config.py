"""The sizes of the operator, checked when they are set."""

from dataclasses import dataclass, fields
from numbers import Integral, Real

from fsa_core.errors import InputError
from fsa_core.problem import BLOCK_SIZES, MAX_SLOTS


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
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least.get(name, 1):
                _refuse(name, value, f"an integer of at least {least.get(name, 1)}")
            # NumPy's integers, say, would be told apart from Python's where kernels are looked up.
            object.__setattr__(self, name, int(value))
        for name in ("kernel_size", "block_size"):
            if getattr(self, name) % self.stride:
                _refuse(name, getattr(self, name), f"a multiple of stride, {self.stride}")
        if self.block_size not in BLOCK_SIZES:
            _refuse("block_size", self.block_size, f"one of {', '.join(map(str, BLOCK_SIZES))}")
        forced = self.num_first_blocks + self.num_local_blocks
        if not forced <= self.top_k <= MAX_SLOTS:
            _refuse("top_k", self.top_k, f"from {forced}, the number of forced blocks, to {MAX_SLOTS}")
        for name in ("top_p", "min_share"):
            share = getattr(self, name)
            if share is not None and not (isinstance(share, Real) and 0 < float(share) <= 1):
                _refuse(name, share, "above 0 and at most 1, or None")

    @property
    def has_budget(self) -> bool:
        """Whether something else than ``top_k`` may end a row."""
        return self.top_p is not None or self.min_share is not None


def _refuse(name: str, value: object, expected: str) -> None:
    raise InputError(
        f"INVALID_{name.upper()}",
        name,
        f"{name} is {value!r}: expected {expected}",
        got=value,
        expected=expected,
    )

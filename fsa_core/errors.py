"""What the library raises when its input breaks the contract."""

import itertools
from collections.abc import Sequence
from typing import Any, NoReturn


class InputError(ValueError):
    """A call that the contract refuses.

    ``reason`` is a stable UPPER_SNAKE name for programs, ``field`` the argument at fault, and ``metadata``
    the facts as strings: always ``field``, and what applies of ``got``, ``expected``, ``index``, ``head``,
    ``token``, ``row``, ``slot``, ``value``, ``sequence``.
    """

    def __init__(self, reason: str, field: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.metadata = {"field": field, **{name: str(value) for name, value in metadata.items()}}

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made anew from what it told its base, which here is the message alone.
        return type(self), (self.reason, self.field, str(self)), vars(self)


def refuse(reason: str, field: str, what: str, got: object, expected: str) -> NoReturn:
    """Raise InputError for a property ``what`` of a whole field."""
    raise InputError(
        reason, field, f"{field} has {what} {got}: expected {expected}", got=got, expected=expected
    )


def refuse_value(name: str, value: object, expected: str) -> NoReturn:
    """Raise InputError for an option, reason INVALID_<NAME>."""
    message = f"{name} is {value!r}: expected {expected}"
    raise InputError(f"INVALID_{name.upper()}", name, message, got=value, expected=expected)


def refuse_bad_starts(name: str, starts: Sequence[int], num_tokens: int | None) -> None:
    """Raise InputError for cu_seqlens not from 0, decreasing, or not to ``num_tokens`` if that is given."""
    if starts[0] != 0:
        _refuse_start(name, 0, starts[0], "0")
    for index, (before, value) in enumerate(itertools.pairwise(starts), start=1):
        if value < before:
            _refuse_start(name, index, value, f"at least {before}, the one before it")
    if num_tokens is not None and starts[-1] != num_tokens:
        _refuse_start(name, len(starts) - 1, starts[-1], f"{num_tokens}, the token count")


def _refuse_start(name: str, index: int, value: int, expected: str) -> NoReturn:
    raise InputError(
        "INVALID_CU_SEQLENS",
        name,
        f"{name}[{index}] is {value}: expected {expected}",
        index=index,
        value=value,
        expected=expected,
    )

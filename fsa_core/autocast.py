"""Autocast stops at an operator: what it computes in float32 stays in float32."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
# What operators run on.
KINDS = ("cpu", "cuda")


def in_own_precision(function: F) -> F:
    """``function`` without autocast, wherever it is called from."""

    @wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        # To look for a tensor, whose device it is, would take longer.
        kinds = [kind for kind in KINDS if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **options)
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **options)

    return guarded  # type: ignore[return-value]

"""Autocast stops at an operator: what it computes in float32 stays in float32."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_own_precision(function: F) -> F:
    """``function`` without autocast on the device of its first tensor, wherever it is called from."""

    @wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        kind = next((x.device.type for x in args if isinstance(x, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(kind):
            return function(*args, **options)
        with torch.autocast(kind, enabled=False):
            return function(*args, **options)

    return guarded  # type: ignore[return-value]

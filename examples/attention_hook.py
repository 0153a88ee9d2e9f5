"""Attention of one's own in a transformers model.

register("mine", attend)
model.set_attn_implementation("mine")
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

# q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] with the cache in k and v, softmax scale -> [Tq, Hq, Dv].
# The queries are the last tokens of one sequence; causality is the function's own business.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


def register(name: str, attend: Attend) -> None:
    """Make ``attend`` what ``name`` stands for, in place of what it stood for before."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, Hq, Tq, D], key and value [1, Hkv, Tk, D] -> [1, Tq, Hq, D]."""
        if len(query) != 1:
            raise ValueError(f"one sequence at a time, not {len(query)}")
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        return attend(q, k, v, scaling)[None], None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> None:
    """Padding has no place in a single sequence."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("padded batches are not supported")

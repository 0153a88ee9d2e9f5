"""Sliding-window attention in torch operations and bounded memory."""

import torch

from fsa_core.nsa.intervals import Intervals, interval_attention
from fsa_core.nsa.validation import Call


def sliding_window_attention_torch(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the last ``window`` keys up to a query's own: out, lse as ``interval_attention``."""
    end = call.place(q.shape[0]).num_visible_keys
    first = (end - call.config.window).clamp(min=0)
    return interval_attention(
        q,
        k,
        v,
        Intervals(first, end, call.cu_seqlens_q.tolist(), list(call.key_starts)),
        softmax_scale=call.softmax_scale,
        workspace_limit_bytes=call.workspace_limit_bytes,
    )

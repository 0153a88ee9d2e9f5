"""Block choices to measure on: the worst case, and one with the statistics of a real model's."""

from typing import Literal

import torch

Kind = Literal["random", "real"]

# Fitted to what SmolLM2 chooses on real text: scores drift over so many tokens, with so much noise a block.
DRIFT_TOKENS = 256
NOISE_BLOCKS = 25.6


def causal_block_indices(
    num_tokens: int, num_heads: int, num_slots: int, block_size: int, kind: Kind, generator: torch.Generator
) -> torch.Tensor:
    """int32 [num_heads, num_tokens, num_slots], ascending, -1 last; the first, own and previous block always.

    ``random``: neighbouring tokens agree on nothing else. ``real``: they agree as a model's do.
    """
    device = generator.device
    token = torch.arange(num_tokens, device=device)
    own = token // block_size
    num_blocks = int(own[-1]) + 1
    if kind == "random":
        score = torch.rand(num_heads, num_tokens, num_blocks, device=device, generator=generator)
    else:
        knots = num_tokens // DRIFT_TOKENS + 2
        base = torch.rand(num_heads, knots, num_blocks, device=device, generator=generator)
        weight = ((token % DRIFT_TOKENS) / DRIFT_TOKENS)[None, :, None]
        left = token // DRIFT_TOKENS
        score = torch.lerp(base[:, left], base[:, left + 1], weight)
        noise = torch.rand(score.shape, device=device, generator=generator)
        score += NOISE_BLOCKS / num_blocks * noise
    score.masked_fill_(torch.arange(num_blocks, device=device) > own[:, None], -1.0)
    score[:, :, 0] = 2.0
    for forced in (own, (own - 1).clamp(min=0)):
        score.scatter_(2, forced[None, :, None].expand(num_heads, num_tokens, 1), 3.0)
    best = score.topk(min(num_slots, num_blocks), dim=2)
    ids = best.indices.masked_fill(best.values < 0, num_blocks).sort(dim=2).values
    return ids.masked_fill(ids == num_blocks, -1).int().contiguous()

"""Block choices to measure on: the worst case, one with the statistics of a real model's, and others."""

from typing import Literal

import torch

DrawnKind = Literal["random", "real", "same"]

# Fitted to what SmolLM2 chooses on real text: scores drift over so many tokens, with so much noise a block.
DRIFT_TOKENS = 256
NOISE_BLOCKS = 25.6
# The choice is drawn from a score a (head, token, block): so many at once, whatever the length.
SCORES_AT_ONCE = 1 << 28


def causal_block_indices(
    num_tokens: int,
    num_heads: int,
    num_slots: int,
    block_size: int,
    kind: DrawnKind,
    generator: torch.Generator,
) -> torch.Tensor:
    """int32 [num_heads, num_tokens, num_slots], ascending, -1 last.

    ``random`` and ``real`` always have the first, own and previous block; in ``random`` neighbouring tokens
    agree on nothing else, in ``real`` as a model's do. ``same``: every token chooses block 0 and no other.
    """
    device = generator.device
    if kind == "same":
        ids = torch.full((num_heads, num_tokens, num_slots), -1, dtype=torch.int32, device=device)
        ids[:, :, 0] = 0
        return ids
    num_blocks = -(-num_tokens // block_size)
    knots = torch.empty(0, device=device)
    if kind == "real":
        shape = (num_heads, num_tokens // DRIFT_TOKENS + 2, num_blocks)
        knots = torch.rand(shape, device=device, generator=generator)
    step = max(SCORES_AT_ONCE // (num_heads * num_blocks), 1)
    pieces = []
    for first in range(0, num_tokens, step):
        token = torch.arange(first, min(first + step, num_tokens), device=device)
        score = torch.rand(num_heads, len(token), num_blocks, device=device, generator=generator)
        if kind == "real":
            score = score.mul_(NOISE_BLOCKS / num_blocks).add_(_drift(knots, token))
        pieces.append(_choose(score, token, num_slots, block_size))
    return torch.cat(pieces, dim=1)


def _drift(knots: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    weight = ((token % DRIFT_TOKENS) / DRIFT_TOKENS)[None, :, None]
    left = token // DRIFT_TOKENS
    return torch.lerp(knots[:, left], knots[:, left + 1], weight)


def _choose(score: torch.Tensor, token: torch.Tensor, num_slots: int, block_size: int) -> torch.Tensor:
    """The best ``num_slots`` of ``score`` [heads, tokens, blocks], and the forced blocks."""
    num_heads, num_tokens, num_blocks = score.shape
    own = token // block_size
    score.masked_fill_(torch.arange(num_blocks, device=token.device) > own[:, None], -1.0)
    score[:, :, 0] = 2.0
    for forced in (own, (own - 1).clamp(min=0)):
        score.scatter_(2, forced[None, :, None].expand(num_heads, num_tokens, 1), 3.0)
    best = score.topk(min(num_slots, num_blocks), dim=2)
    ids = best.indices.masked_fill(best.values < 0, num_blocks).sort(dim=2).values
    return ids.masked_fill(ids == num_blocks, -1).int().contiguous()

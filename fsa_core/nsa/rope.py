"""Rotary position embedding (arXiv 2104.09864) in Llama's layout: channel i of a head pairs with i + half."""

import torch

Turns = tuple[torch.Tensor, torch.Tensor]


def rotate(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn channel pair i of a token by position * theta^(-2i / head_dim).

    x: [num_tokens, heads, head_dim], head_dim even; position: int64 [num_tokens]. Returns x's dtype.
    """
    return turn(x, turns_at(position, x.shape[-1], theta))


def turns_at(position: torch.Tensor, head_dim: int, theta: float) -> Turns:
    """Cosines of every channel's angle, and sines, negative for the first of a pair; the same for q and k.

    Both float32 [num_tokens, 1, head_dim].
    """
    half = head_dim // 2
    # float32 cannot tell the angles of neighbours apart once positions reach millions.
    frequency = theta ** (torch.arange(half, dtype=torch.float64, device=position.device) / -half)
    # A cosine is the same of both, and a sine the opposite.
    angle = position[:, None] * torch.cat([-frequency, frequency])
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


def turn(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Turn the channel pairs of x [num_tokens, heads, head_dim]; returns x's dtype."""
    cos, sin = turns
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)

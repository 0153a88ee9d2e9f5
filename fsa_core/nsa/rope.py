"""Rotary position embedding (arXiv 2104.09864) in Llama's layout: channel i of a head pairs with i + half."""

import torch

Turns = tuple[torch.Tensor, torch.Tensor]


def rotate(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn channel pair i of a token by position * theta^(-2i / head_dim).

    x: [num_tokens, heads, head_dim], head_dim even; position: int64 [num_tokens]. Returns x's dtype.
    """
    return turn(x, turns_at(position, x.shape[-1], theta))


def turns_at(position: torch.Tensor, head_dim: int, theta: float) -> Turns:
    """Cosines and sines of all pairs' angles, float32 [num_tokens, 1, head_dim / 2]; of q and k the same."""
    half = head_dim // 2
    # float32 cannot tell the angles of neighbours apart once positions reach millions.
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = position[:, None].double() * theta**-exponent
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


def turn(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Turn the channel pairs of x [num_tokens, heads, head_dim]; returns x's dtype."""
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

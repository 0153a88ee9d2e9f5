"""Rotary position embedding (arXiv 2104.09864) in Llama's layout: channel i of a head pairs with i + half."""

import torch


def rotate(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn channel pair i of a token by position * theta^(-2i / head_dim).

    x: [num_tokens, heads, head_dim], head_dim even; position: int64 [num_tokens]. Returns x's dtype.
    """
    half = x.shape[-1] // 2
    # float32 cannot tell the angles of neighbours apart once positions reach millions.
    exponent = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = position[:, None].double() * theta**-exponent
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

"""A decoder layer of a public model's sizes, whose attention is swapped."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# q [tokens, q heads, dim], k and v [tokens, kv heads, dim], gates [tokens, q heads, 3]; the answer is as q.
Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes as in the model's published configuration; ``num_layers`` is what the whole model has."""

    name: str
    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_q_heads: int
    num_kv_heads: int
    rope_theta: float
    head_dim: int = 128
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6


MODELS = (
    ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, rope_theta=5e5, norm_eps=1e-5),
    ModelShape("Qwen3-14B", 40, 5120, 17408, 40, 8, rope_theta=1e6, qk_norm=True),
    ModelShape("Qwen2.5-32B", 64, 5120, 27648, 40, 8, rope_theta=1e6, qkv_bias=True),
)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU. Beside the model's own weights it has those of the gates of NSA."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        q_dim, kv_dim = (n * shape.head_dim for n in (shape.num_q_heads, shape.num_kv_heads))
        self.qkv_dims = (q_dim, kv_dim, kv_dim)
        self.attention_norm = nn.RMSNorm(shape.hidden_dim, eps=shape.norm_eps)
        self.qkv = nn.Linear(shape.hidden_dim, sum(self.qkv_dims), bias=shape.qkv_bias)
        self.out = nn.Linear(q_dim, shape.hidden_dim, bias=False)
        self.gates = nn.Linear(shape.hidden_dim, 3 * shape.num_q_heads, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.mlp_norm = nn.RMSNorm(shape.hidden_dim, eps=shape.norm_eps)
        self.gate_up = nn.Linear(shape.hidden_dim, 2 * shape.mlp_dim, bias=False)
        self.down = nn.Linear(shape.mlp_dim, shape.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, core: Core) -> torch.Tensor:
        """x [tokens, hidden dim]; rotation as ``rotation_of`` gives it."""
        attended = core(*self.operands(x, rotation)).flatten(1)
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def operands(self, x: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the core takes: q, k, v and gates, each contiguous."""
        normed = self.attention_norm(x)
        q, k, v = (
            t.unflatten(1, (-1, self.shape.head_dim)) for t in self.qkv(normed).split(self.qkv_dims, dim=-1)
        )
        q, k = _rotated(self.q_norm(q), rotation), _rotated(self.k_norm(k), rotation)
        gates = self.gates(normed).sigmoid().unflatten(1, (-1, 3))
        return q, k, v.contiguous(), gates


class Stack(nn.Module):
    """Layers one after the other, with random weights that depend on the seed alone."""

    def __init__(self, shape: ModelShape, num_layers: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        with device:
            self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.to(dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=INITIAL_STD, generator=generator)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, core: Core) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, rotation, core)
        return x


def rotation_of(shape: ModelShape, num_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of every position: [2, tokens, 1, head dim] in the dtype of ``like``."""
    half = torch.arange(0, shape.head_dim, 2, device=like.device, dtype=torch.float64)
    frequencies = shape.rope_theta ** (-half / shape.head_dim)
    angles = torch.arange(num_tokens, device=like.device, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def _rotated(t: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    cos, sin = rotation
    first, second = t.chunk(2, dim=-1)
    return t * cos + torch.cat([-second, first], dim=-1) * sin

"""A small causal language model of bytes, whose attention is Native Sparse Attention or dense."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.module import NativeSparseAttention
from fsa_core.nsa.rope import rotate

NUM_BYTES = 256
ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``nsa`` and ``compression`` are of the sparse model alone; all else is the same for both.

    Weighted compression has hardly any parameters of its own; the paper's, an MLP, has nearly as many as the
    rest of so small a model.
    """

    num_layers: int = 8
    hidden_dim: int = 512
    mlp_dim: int = 1536
    num_q_heads: int = 8
    num_kv_heads: int = 2
    nsa: NSAConfig = field(default_factory=lambda: NSAConfig(top_k=8, window=256))
    compression: str = "weighted"


class DenseAttention(nn.Module):
    """Causal attention over every key, by torch; projections and rotation as in NativeSparseAttention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_dim // config.num_q_heads
        kv_dim = config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
        """x: [num_sequences * length, hidden_dim]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        position = torch.arange(length, device=x.device).repeat(len(x) // length)
        q, k = (rotate(t, position, ROPE_THETA) for t in (q, k))
        q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return projected


class SparseAttention(NativeSparseAttention):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            config.hidden_dim,
            config.num_q_heads,
            config.num_kv_heads,
            config=config.nsa,
            compression=config.compression,
            rope_theta=ROPE_THETA,
        )

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, cu_seqlens)


ATTENTION: dict[str, type[nn.Module]] = {"sparse": SparseAttention, "dense": DenseAttention}


class Layer(nn.Module):
    """Attention and a gated MLP, each after a norm and beside a residual."""

    def __init__(self, attention: str, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_dim)
        self.attention = ATTENTION[attention](config)
        self.mlp_norm = nn.RMSNorm(config.hidden_dim)
        self.up = nn.Linear(config.hidden_dim, 2 * config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cu_seqlens, length)
        gate, up = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        grown: torch.Tensor = x + self.down(F.silu(gate) * up)
        return grown


class ByteModel(nn.Module):
    """Logits of the next byte; input and output embeddings are one matrix. attention: a key of ATTENTION."""

    def __init__(self, attention: str, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, config.hidden_dim)
        self.layers = nn.ModuleList(Layer(attention, config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def logits(self, given: torch.Tensor) -> torch.Tensor:
        """[num_sequences * length, NUM_BYTES], of the byte after each given [num_sequences, length]."""
        num_sequences, length = given.shape
        starts = torch.arange(0, (num_sequences + 1) * length, length, device=given.device, dtype=torch.int32)
        x = self.embedding(given.flatten())
        for layer in self.layers:
            x = layer(x, starts, length)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, bytes_: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats a byte; bytes_: int64 [num_sequences, length + 1]."""
        return F.cross_entropy(self.logits(bytes_[:, :-1]).float(), bytes_[:, 1:].flatten())

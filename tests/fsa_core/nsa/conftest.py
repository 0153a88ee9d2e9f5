"""Calls of the NSA operator that are valid by construction, and bounds of their errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.reference import compress_reference, pool_mean

SMALL = NSAConfig(kernel_size=8, stride=4, block_size=16, top_k=3, num_local_blocks=1, window=20)


@dataclass(frozen=True)
class Call:
    """The tensors of one call; k_cmp and v_cmp are means, cu_seqlens_k the keys' before compression."""

    config: NSAConfig
    softmax_scale: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    gates: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor


def _make_call(
    device: torch.device,
    *,
    q_lens: Sequence[int] = (70, 33),
    k_lens: Sequence[int] | None = None,
    num_kv_heads: int = 2,
    group_size: int = 2,
    head_dim: int = 16,
    value_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    config: NSAConfig = SMALL,
    softmax_scale: float = 0.25,
    q_scale: float = 1.0,
    seed: int = 0,
) -> Call:
    k_lens = q_lens if k_lens is None else k_lens
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    num_q, num_k, num_q_heads = sum(q_lens), sum(k_lens), num_kv_heads * group_size
    cu_k = cumulative(k_lens)
    q = q_scale * normal(num_q, num_q_heads, head_dim)
    k, v = normal(num_k, num_kv_heads, head_dim), normal(num_k, num_kv_heads, value_dim)
    k_cmp, v_cmp = (compress_reference(x, cu_k, config, pool_mean) for x in (k, v))
    tensors = (q, k, v, k_cmp, v_cmp, normal(num_q, num_q_heads, 3).sigmoid())
    return Call(
        config,
        softmax_scale,
        *(x.to(device=device, dtype=dtype) for x in tensors),
        cumulative(q_lens).to(device),
        cu_k.to(device),
    )


def cumulative(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


@pytest.fixture(scope="session")
def make_call(device: torch.device) -> Callable[..., Call]:
    return partial(_make_call, device)

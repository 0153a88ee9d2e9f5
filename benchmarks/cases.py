"""What is measured: the registry of cases and the inputs they stand for."""

from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.indices import Kind, causal_block_indices


@dataclass(frozen=True, slots=True)
class Case:
    """One causal sequence of ``num_tokens`` in bfloat16."""

    num_tokens: int
    group_size: int
    kind: Kind
    num_kv_heads: int = 4
    head_dim: int = 128
    block_size: int = 64
    num_slots: int = 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """q [tokens, q heads, dim]; k, v [tokens, kv heads, dim]; block_indices [kv heads, tokens, slots]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    block_size: int
    softmax_scale: float

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def selected_attention_cases(tokens: list[int], group_sizes: list[int], kinds: list[Kind]) -> list[Case]:
    return [Case(n, g, kind) for n, kind, g in product(tokens, kinds, group_sizes)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(case.num_tokens)

    def normal(heads: int) -> torch.Tensor:
        shape = (case.num_tokens, heads, case.head_dim)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    ids = causal_block_indices(
        case.num_tokens, case.num_kv_heads, case.num_slots, case.block_size, case.kind, generator
    )
    return Inputs(
        q=normal(case.num_kv_heads * case.group_size),
        k=normal(case.num_kv_heads),
        v=normal(case.num_kv_heads),
        block_indices=ids,
        cu_seqlens=torch.tensor([0, case.num_tokens], dtype=torch.int32, device=device),
        block_size=case.block_size,
        softmax_scale=case.head_dim**-0.5,
    )


def sampled_truth(x: Inputs, tokens: list[int]) -> torch.Tensor:
    """The float64 answer at a few tokens, [len(tokens), q heads, dim], straight from the definition."""
    answer = torch.empty(len(tokens), *x.q.shape[1:], dtype=torch.float64, device=x.q.device)
    within = torch.arange(x.block_size, device=x.q.device)
    for row, token in enumerate(tokens):
        for head in range(x.q.shape[1]):
            kv_head = head // x.group_size
            ids = x.block_indices[kv_head, token]
            keys = (ids[ids >= 0].long()[:, None] * x.block_size + within).flatten()
            keys = keys[keys <= token]
            scores = x.k[keys, kv_head].double() @ x.q[token, head].double() * x.softmax_scale
            answer[row, head] = scores.softmax(0) @ x.v[keys, kv_head].double()
    return answer

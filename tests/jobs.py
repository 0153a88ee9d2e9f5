"""Random requests as they lie in an arena, and their answers: for tests of the data plane."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from fsa_core.api import attend
from fsa_core.problem import Problem
from service.arena import ArenaPool, Lease
from service.job import Field, Job, Layout

SELECTED = Problem(
    num_q_tokens=0,
    num_k_tokens=0,
    num_sequences=0,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=32,
    value_dim=24,
    dtype=torch.float16,
    index_heads=2,
    num_slots=0,
    block_size=16,
    causal=True,
    softmax_scale=0.2,
)
DENSE = replace(SELECTED, block_size=0, index_heads=0)


def sized(common: Problem, lengths_q: Sequence[int], lengths_k: Sequence[int], num_slots: int) -> Problem:
    """``common`` with these sequences."""
    return replace(
        common,
        num_q_tokens=sum(lengths_q),
        num_k_tokens=sum(lengths_k),
        num_sequences=len(lengths_q),
        num_slots=0 if common.is_dense else num_slots,
    )


@dataclass(frozen=True)
class Request:
    """A request whose inputs lie in its lease; its outputs are NaN until somebody writes them."""

    problem: Problem
    lease: Lease

    @classmethod
    def write(cls, pool: ArenaPool, common: Problem, seed: int, *, max_length: int = 60) -> "Request":
        """One to three sequences, chunked ones and rows without blocks among them."""
        rng = random.Random(seed)
        lengths_k = [rng.randint(1, max_length) for _ in range(rng.randint(1, 3))]
        lengths_q = [rng.randint(1, length) for length in lengths_k]
        problem = sized(common, lengths_q, lengths_k, num_slots=rng.randint(1, 4))
        request = cls(problem, pool.allocate(Layout.of(problem).total_bytes))
        request._fill(seed, lengths_q, lengths_k)
        return request

    @classmethod
    def without_queries(cls, pool: ArenaPool, common: Problem) -> "Request":
        problem = sized(common, [0], [5], num_slots=1)
        request = cls(problem, pool.allocate(Layout.of(problem).total_bytes))
        request._fill(0, [0], [5])
        return request

    @property
    def job(self) -> Job:
        return Job(self.problem, self.lease.memory)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the lease: q, k, v, cu_seqlens_q, cu_seqlens_k, block_indices, out or lse."""
        field: Field = getattr(Layout.of(self.problem), name)
        memory = torch.frombuffer(self.lease.view(), dtype=torch.uint8)
        return memory[field.offset : field.offset + field.num_bytes].view(field.dtype).view(field.shape)

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What lies where the answer belongs, copied."""
        return self.tensor("out").clone(), self.tensor("lse").clone()

    def expected(self, device: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer of the request alone, computed in this process."""
        names = ("q", "k", "v", "block_indices", "cu_seqlens_q", "cu_seqlens_k")
        q, k, v, indices, cu_q, cu_k = (self.tensor(name).to(device, copy=True) for name in names)
        selection = None if self.problem.is_dense else indices
        out, lse = attend(self.problem, q, k, v, selection, cu_q, cu_k, backend=backend)
        return out.cpu(), lse.cpu()

    def is_answered(self, device: str = "cpu", backend: str = "auto") -> bool:
        """Whether the answer there is bitwise that of the request alone."""
        pairs = zip(self.answer(), self.expected(device, backend), strict=True)
        return all(torch.equal(_bits(got), _bits(wanted)) for got, wanted in pairs)

    def _fill(self, seed: int, lengths_q: Sequence[int], lengths_k: Sequence[int]) -> None:
        random_ = torch.Generator().manual_seed(seed)
        for name in ("q", "k", "v"):
            target = self.tensor(name)
            target.copy_(torch.randn(target.shape, generator=random_))
        for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
            self.tensor(name).copy_(torch.tensor([0, *accumulate(lengths)]))
        for name in ("out", "lse"):
            self.tensor(name).fill_(torch.nan)
        if not self.problem.is_dense:
            self.tensor("block_indices").copy_(self._selection(random_, lengths_q, lengths_k))

    def _selection(
        self, random_: torch.Generator, lengths_q: Sequence[int], lengths_k: Sequence[int]
    ) -> torch.Tensor:
        """Unique causal ids in any order; where a token has fewer blocks than slots, and by chance, -1."""
        p = self.problem
        rows = torch.full((p.index_heads, p.num_q_tokens, p.num_slots), -1)
        token = 0
        for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
            for position in range(length_k - length_q, length_k):
                for head in range(p.index_heads):
                    ids = torch.randperm(position // p.block_size + 1, generator=random_)[: p.num_slots]
                    keep = torch.rand(ids.shape, generator=random_) < 0.8
                    rows[head, token, : len(ids)] = torch.where(keep, ids, -1)
                token += 1
        return rows


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)

"""The tensors that a case stands for, and how much work they are."""

from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, Case
from fsa_core.drawn_indices import causal_block_indices
from fsa_core.patterns import expand_query_blocks

INT32_BYTES = 4
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """q [tokens, q heads, dim]; k, v [tokens, kv heads, dim]; block_indices [kv heads, tokens, slots].

    A part of the operator that selects has no block_indices. Of decode, q is a token for each sequence, and
    k, v are the keys of all sequences. ``rows``: what ``query_block_size`` tokens share a row of, of which
    block_indices are the normal form.
    ``grad_out`` [tokens, q heads, value dim] is what the backward stage starts from.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    block_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    block_size: int
    softmax_scale: float
    rows: torch.Tensor
    query_block_size: int

    @property
    def num_tokens(self) -> int:
        return self.q.shape[0]

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def keys_of_row(self) -> int:
        """That a row of indices attends with all its slots."""
        return self.block_indices.shape[2] * self.block_size

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Work:
    """What no implementation can do without: multiply-adds of the attended pairs, and every tensor once."""

    pairs: int
    flops: int
    bytes: int


def make_inputs(case: Case, device: torch.device, recorded: torch.Tensor | None = None) -> Inputs:
    """Normally distributed tensors, the same for every run on one kind of device."""
    generator = torch.Generator(device).manual_seed(case.num_tokens)

    num_tokens = case.num_tokens * case.batch
    num_queries = case.batch if case.part == "decode" else num_tokens

    def normal(rows: int, heads: int, dim: int) -> torch.Tensor:
        shape = (rows, heads, dim)
        return torch.randn(shape, device=device, generator=generator, dtype=DTYPES[case.dtype])

    if case.kind == "recorded":
        if recorded is None:
            raise ValueError(f"{case.name} needs recorded indices")
        heads = torch.arange(case.num_kv_heads) % len(recorded)
        ids = recorded[heads, : case.num_tokens].to(device)
    elif case.part == "decode":
        shape = (case.num_kv_heads, case.batch, case.num_tokens // case.block_size)
        chances = torch.rand(shape, device=device, generator=generator)
        ids = chances.topk(case.num_slots).indices.int()
    elif case.part != "selected":
        ids = torch.empty(case.num_kv_heads, case.num_tokens, 0, dtype=torch.int32, device=device)
    else:
        sizes = (case.num_tokens, case.num_kv_heads, case.num_slots, case.block_size)
        ids = causal_block_indices(*sizes, case.kind, generator)
    cu_seqlens = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.num_tokens
    rows, shared = ids, case.query_block_size
    if shared > 1:
        # That of the last token: the others see no more.
        rows = ids[:, shared - 1 :: shared].contiguous()
        ids = expand_query_blocks(
            rows,
            query_block_size=shared,
            block_size=case.block_size,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            causal=True,
        )
    num_q_heads = case.num_kv_heads * case.group_size
    return Inputs(
        q=normal(num_queries, num_q_heads, case.head_dim),
        k=normal(num_tokens, case.num_kv_heads, case.head_dim),
        v=normal(num_tokens, case.num_kv_heads, case.value_dim),
        grad_out=normal(num_queries, num_q_heads, case.value_dim),
        block_indices=ids,
        cu_seqlens=cu_seqlens,
        block_size=case.block_size,
        softmax_scale=case.head_dim**-0.5,
        rows=rows,
        query_block_size=shared,
    )


def work_of(case: Case, x: Inputs) -> Work | None:
    """Forward has two products of a (query head, key) pair, backward five, and the index none.

    None of a part that selects: how much there is to attend is its answer.
    """
    if case.part == "decode":
        pairs = x.block_indices.numel() * case.block_size * case.group_size
        keys_bytes = pairs // case.group_size * (case.head_dim + case.value_dim) * x.k.element_size()
        flops = 2 * pairs * (case.head_dim + case.value_dim)
        return Work(pairs, flops, keys_bytes + x.q.nbytes + x.grad_out.nbytes)
    if case.part != "selected":
        return None
    pairs = attended_pairs(x)
    tensors_bytes = sum(t.nbytes for t in (x.q, x.k, x.v, x.grad_out, x.block_indices))
    if case.stage == "index":
        return Work(pairs, 0, 2 * x.block_indices.nbytes)
    lse_bytes = x.q.shape[0] * x.q.shape[1] * FLOAT32_BYTES
    if case.stage == "forward":
        # The answer is as large as grad_out.
        return Work(pairs, 2 * pairs * (case.head_dim + case.value_dim), tensors_bytes + lse_bytes)
    flops = 2 * pairs * (3 * case.head_dim + 2 * case.value_dim)
    gradients_bytes = x.q.nbytes + x.k.nbytes + x.v.nbytes
    return Work(pairs, flops, tensors_bytes + x.grad_out.nbytes + lse_bytes + gradients_bytes)


def attended_pairs(x: Inputs) -> int:
    """(query head, key) pairs."""
    return int(attended_keys(x.block_indices, x.block_size).sum()) * x.group_size


def attended_keys(block_indices: torch.Tensor, block_size: int) -> torch.Tensor:
    """How many keys each row attends: whole blocks, and of a token's own block the keys up to itself.

    block_indices [index heads, tokens, slots] of one sequence from its first token on; int64 [index heads,
    tokens].
    """
    token = torch.arange(block_indices.shape[1], device=block_indices.device)[:, None]
    visible = (token + 1 - block_indices.long() * block_size).clamp(max=block_size)
    return visible.where(block_indices >= 0, 0).sum(-1)

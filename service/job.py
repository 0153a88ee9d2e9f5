"""One admitted request as the data plane sees it: its sizes and where its bytes lie in an arena."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fsa_core.nsa.selecting import SelectingProblem
from fsa_core.problem import Problem
from fsa_core.tiles import slot_class

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor inside a request's slice of an arena."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of one request lies, from the start of its slice: inputs, then outputs.

    The front end and the worker both derive it from the Problem, so it never crosses between them. ``gates``
    are empty but for a gated sum, and ``block_indices`` are an output where the server chooses them; whether
    they are an input is ``takes_blocks``, which offsets do not tell: a request may have no query.
    """

    q: Field
    k: Field
    v: Field
    cu_seqlens_q: Field
    cu_seqlens_k: Field
    gates: Field
    block_indices: Field
    out: Field
    lse: Field
    takes_blocks: bool
    input_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, problem: Problem) -> "Layout":
        p = problem
        selects = isinstance(p, SelectingProblem)
        num_gates = 3 if isinstance(p, SelectingProblem) and p.is_gated else 0
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((p.num_q_tokens, p.num_q_heads, p.head_dim), p.dtype),
            ((p.num_k_tokens, p.num_kv_heads, p.head_dim), p.dtype),
            ((p.num_k_tokens, p.num_kv_heads, p.value_dim), p.dtype),
            ((p.num_sequences + 1,), torch.int32),
            ((p.num_sequences + 1,), torch.int32),
            ((p.num_q_tokens, p.num_q_heads, num_gates), p.dtype),
            ((p.index_heads, p.num_q_tokens, p.num_slots), torch.int32),
            ((p.num_q_tokens, p.num_q_heads, p.value_dim), p.dtype),
            ((p.num_q_tokens, p.num_q_heads), torch.float32),
        ]
        fields, offset = [], 0
        for shape, dtype in shapes:
            field = Field(offset, shape, dtype)
            fields.append(field)
            offset = -(-(offset + field.num_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        q, k, v, cu_seqlens_q, cu_seqlens_k, gates, block_indices, out, lse = fields
        return cls(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            gates,
            block_indices,
            out,
            lse,
            takes_blocks=not (selects or p.is_dense),
            input_bytes=(block_indices if selects else out).offset,
            total_bytes=offset,
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """A request's bytes: ``num_bytes`` from ``offset`` in one arena segment."""

    segment: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """What the worker needs to know of one request; the tensors lie at ``memory`` as Layout.of says."""

    problem: Problem
    memory: Slice


@dataclass(frozen=True, slots=True)
class JobResult:
    """Times of the batch a job rode in, in seconds; the answer lies in the job's own slice."""

    h2d_seconds: float
    kernel_seconds: float
    d2h_seconds: float


def compatible(problem: Problem) -> Problem:
    """What requests must share to ride in one batch: everything but lengths, and slots but for their class.

    Their answers would otherwise depend on company, as kernels are chosen by the class.
    """
    slots = 0 if problem.is_dense else slot_class(problem.num_slots)
    return replace(problem, num_q_tokens=0, num_k_tokens=0, num_sequences=0, num_slots=slots)


def packed(problems: Sequence[Problem]) -> Problem:
    """The Problem of compatible requests packed into one varlen call."""
    return replace(
        problems[0],
        num_q_tokens=sum(p.num_q_tokens for p in problems),
        num_k_tokens=sum(p.num_k_tokens for p in problems),
        num_sequences=sum(p.num_sequences for p in problems),
        num_slots=max(p.num_slots for p in problems),
    )

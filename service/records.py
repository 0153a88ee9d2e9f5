"""What server and worker tell each other: records of a kind byte and fixed little-endian fields.

Nothing in one is ever executed or unpickled. Payloads never pass here: they lie in shared memory.
"""

import math
import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar, Self

import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import SelectingProblem
from fsa_core.problem import BLOCK_SIZES, Problem
from service.devices import DeviceInfo
from service.job import Job, Slice, compatible

MAX_BATCH_JOBS = 1024
MAX_TEXT_BYTES = 4096

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class ProtocolError(Exception):
    """The peer sent something that is no record. Neither side goes on after it."""


class FailureKind(IntEnum):
    """What became of the worker whose batch failed: FATAL is its last word, after the others it lives."""

    ERROR = 0
    OOM = 1
    FATAL = 2


class _Fixed:
    """A record whose fields, in order, are those of one struct format."""

    __slots__ = ()
    _FORMAT: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        return self._FORMAT.pack(*(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]

    @classmethod
    def decode(cls, data: memoryview) -> Self:
        return cls(*cls._FORMAT.unpack(data))


@dataclass(frozen=True, slots=True)
class AddSegment(_Fixed):
    """Map the segment whose descriptor comes with this record. To the worker."""

    segment: int
    num_bytes: int
    _FORMAT = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class DropSegment(_Fixed):
    """Unmap a segment: no job refers to it any more. To the worker."""

    segment: int
    _FORMAT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Stop(_Fixed):
    """Finish what was submitted, then exit with 0. To the worker."""

    _FORMAT = struct.Struct("<")


@dataclass(frozen=True, slots=True)
class Done(_Fixed):
    """The answers of a batch lie in its jobs' slices. From the worker."""

    batch: int
    h2d_seconds: float
    kernel_seconds: float
    d2h_seconds: float
    _FORMAT = struct.Struct("<Qddd")


@dataclass(frozen=True, slots=True)
class Memory(_Fixed):
    """Device memory (of the CPU worker: its resident memory and the machine's). From the worker."""

    used_bytes: int
    total_bytes: int
    _FORMAT = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Failed:
    """A batch came to nothing. The message is for logs: it may hold paths. From the worker."""

    batch: int
    kind: FailureKind
    message: str
    _FORMAT = struct.Struct("<QB")

    def encode(self) -> bytes:
        return self._FORMAT.pack(self.batch, self.kind) + _encode_text(self.message)

    @classmethod
    def decode(cls, data: memoryview) -> Self:
        batch, kind = cls._FORMAT.unpack_from(data)
        (message,) = _decode_texts(data[cls._FORMAT.size :], 1)
        return cls(batch, FailureKind(kind), message)


@dataclass(frozen=True, slots=True)
class Ready:
    """The device works; segments and batches are taken from now on. From the worker."""

    device: DeviceInfo
    memory: Memory
    _FORMAT = struct.Struct("<IQQQ")

    def encode(self) -> bytes:
        d = self.device
        texts = (d.kind, d.name, d.torch_version, d.triton_version, d.cuda_version)
        sizes = (d.memory_bytes, self.memory.used_bytes, self.memory.total_bytes)
        return self._FORMAT.pack(d.index, *sizes) + b"".join(map(_encode_text, texts))

    @classmethod
    def decode(cls, data: memoryview) -> Self:
        index, memory_bytes, *memory = cls._FORMAT.unpack_from(data)
        kind, name, *versions = _decode_texts(data[cls._FORMAT.size :], 5)
        return cls(DeviceInfo(kind, index, name, memory_bytes, *versions), Memory(*memory))


@dataclass(frozen=True, slots=True)
class Submit:
    """Run compatible jobs (see service.job.compatible) as one varlen batch. To the worker."""

    batch: int
    jobs: tuple[Job, ...]
    # What the jobs share: batch, job count | dtype, heads, dims, index heads, block sizes, causal, scale.
    # Of those that select also: kernel size (else 0), stride, forced blocks, window, shares (or 0), gated.
    _COMMON = struct.Struct("<QI BIIIIIIIBd IIIIIddB")
    # What they do not: slice | query tokens, key tokens, sequences, slots.
    _JOB = struct.Struct("<IQQ QQII")

    def encode(self) -> bytes:
        """
        Raises:
            ValueError: no job, too many, or incompatible ones.
        """
        if not 1 <= len(self.jobs) <= MAX_BATCH_JOBS:
            raise ValueError(f"a batch has 1 to {MAX_BATCH_JOBS} jobs, not {len(self.jobs)}")
        kind = compatible(self.jobs[0].problem)
        if any(compatible(job.problem) != kind for job in self.jobs):
            raise ValueError("the jobs of a batch must be compatible")
        common = _common_fields(kind)
        parts = [self._COMMON.pack(self.batch, len(self.jobs), *common)]
        for job in self.jobs:
            memory, p = job.memory, job.problem
            sizes = (p.num_q_tokens, p.num_k_tokens, p.num_sequences, p.num_slots)
            parts.append(self._JOB.pack(memory.segment, memory.offset, memory.num_bytes, *sizes))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: memoryview) -> Self:
        batch, num_jobs, *common = cls._COMMON.unpack_from(data)
        table = data[cls._COMMON.size :]
        if not 1 <= num_jobs <= MAX_BATCH_JOBS or len(table) != num_jobs * cls._JOB.size:
            raise ProtocolError(f"{len(table)} bytes are not a table of {num_jobs} jobs")
        jobs = []
        for segment, offset, num_bytes, *sizes in cls._JOB.iter_unpack(table):
            jobs.append(Job(_problem(common, sizes), Slice(segment, offset, num_bytes)))
        return cls(batch, tuple(jobs))


def _common_fields(p: Problem) -> tuple[int | float, ...]:
    """What Submit carries once; equal for compatible problems."""
    return (
        _DTYPES.index(p.dtype),
        p.num_q_heads,
        p.num_kv_heads,
        p.head_dim,
        p.value_dim,
        p.index_heads,
        p.block_size,
        p.query_block_size,
        p.causal,
        p.softmax_scale,
        *_selection_fields(p),
    )


def _selection_fields(p: Problem) -> tuple[int | float, ...]:
    if not isinstance(p, SelectingProblem):
        return (0,) * 8
    config = p.config
    return (
        config.kernel_size,
        config.stride,
        config.num_first_blocks,
        config.num_local_blocks,
        config.window,
        config.top_p or 0.0,
        config.min_share or 0.0,
        p.is_gated,
    )


def _problem(common: list[int | float], sizes: list[int]) -> Problem:
    """The Problem of a job, or ProtocolError where its sizes contradict one another."""
    dtype, q_heads, kv_heads, head_dim, value_dim, index_heads, block_size, *others = common
    query_block_size, causal, scale, *selection = others
    num_q_tokens, num_k_tokens, num_sequences, num_slots = sizes
    is_dense = block_size == 0
    sound = (
        dtype < len(_DTYPES)
        and min(kv_heads, head_dim, value_dim, num_sequences) > 0
        and q_heads >= kv_heads
        and q_heads % kv_heads == 0
        and (index_heads == num_slots == 0 if is_dense else index_heads in (1, kv_heads, q_heads))
        and (is_dense or block_size in BLOCK_SIZES)
        and (query_block_size == 1 or (query_block_size > 1 and not is_dense and not selection[0]))
        and causal in (0, 1)
        and math.isfinite(scale)
    )
    if not sound:
        raise ProtocolError(f"no attention call has the sizes {common} {sizes}")
    problem = Problem(
        num_q_tokens=num_q_tokens,
        num_k_tokens=num_k_tokens,
        num_sequences=num_sequences,
        num_q_heads=int(q_heads),
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=_DTYPES[int(dtype)],
        index_heads=int(index_heads),
        num_slots=num_slots,
        block_size=int(block_size),
        causal=bool(causal),
        softmax_scale=scale,
        query_block_size=int(query_block_size),
    )
    return _selecting(problem, selection) if selection[0] else problem


def _selecting(p: Problem, selection: list[int | float]) -> SelectingProblem:
    """``p`` with what it selects by. Raises ValueError, or ProtocolError, where that contradicts itself."""
    kernel_size, stride, first, local, window, top_p, min_share, is_gated = selection
    if not (p.causal and p.index_heads == p.num_kv_heads and is_gated in (0, 1)):
        raise ProtocolError(f"no call that selects has the sizes {p} {selection}")
    config = NSAConfig(
        kernel_size=int(kernel_size),
        stride=int(stride),
        block_size=p.block_size,
        top_k=p.num_slots,
        num_first_blocks=int(first),
        num_local_blocks=int(local),
        window=int(window),
        top_p=top_p or None,
        min_share=min_share or None,
    )
    return SelectingProblem.of(p, config, is_gated=bool(is_gated))


def _encode_text(text: str) -> bytes:
    """Length and UTF-8, cut to MAX_TEXT_BYTES: an error's text must not outgrow a record."""
    data = text.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore").encode()
    return struct.pack("<H", len(data)) + data


def _decode_texts(data: memoryview, count: int) -> list[str]:
    texts, offset = [], 0
    for _ in range(count):
        (size,) = struct.unpack_from("<H", data, offset)
        text = bytes(data[offset + 2 : offset + 2 + size])
        if len(text) != size:
            raise ProtocolError(f"{len(text)} bytes of a text of {size}")
        texts.append(text.decode())
        offset += 2 + size
    if offset != len(data):
        raise ProtocolError(f"{len(data) - offset} bytes after the last text")
    return texts


Record = AddSegment | DropSegment | Submit | Stop | Ready | Done | Failed | Memory

_RECORDS: tuple[type[Record], ...] = (AddSegment, DropSegment, Submit, Stop, Ready, Done, Failed, Memory)


def encode(record: Record) -> bytes:
    return bytes([_RECORDS.index(type(record))]) + record.encode()


def decode(data: bytes) -> Record:
    """
    Raises:
        ProtocolError: ``data`` is not exactly one record.
    """
    if not data or data[0] >= len(_RECORDS):
        raise ProtocolError(f"no record starts with {data[:1]!r}")
    kind = _RECORDS[data[0]]
    try:
        return kind.decode(memoryview(data)[1:])
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from error

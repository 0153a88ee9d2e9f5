"""The arena as the worker maps it: where the tensors of a job lie, and how jobs become one varlen call."""

import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from service.job import Field, Job, Layout
from service.records import ProtocolError


class Segment:
    """A segment of the arena in this process, mapped once there is room for it."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """The descriptor, of a file of at least ``num_bytes``, is closed when it is no longer needed."""
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        self._memory: torch.Tensor | None = None

    @property
    def is_mapped(self) -> bool:
        return self._memory is not None

    def map(self) -> torch.Tensor:
        """uint8 [num_bytes], shared with the front end; the same at every call.

        Raises:
            OSError: there is no room for it now.
        """
        if self._memory is None:
            # The pages exist: populating only fills this process's page table.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapped = mmap.mmap(self._descriptor, self.num_bytes, flags=flags)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
            os.close(self._descriptor)
        return self._memory

    def __del__(self) -> None:
        if self._memory is None:
            os.close(self._descriptor)


@dataclass(frozen=True)
class PlacedJob:
    """A job and where its bytes lie."""

    job: Job
    layout: Layout
    segment: Segment

    @cached_property
    def memory(self) -> torch.Tensor:
        """Its slice of the arena, uint8 on the host. Raises OSError as ``Segment.map`` does."""
        start = self.job.memory.offset
        return self.segment.map()[start : start + self.job.memory.num_bytes]


class Segments:
    """The arena's segments by their numbers."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def add(self, number: int, descriptor: int, num_bytes: int) -> Segment:
        """Take a segment, and its descriptor, and map it before a request needs it.

        Where there is no room for it now, it is mapped when a job needs it, and that job's batch fails if
        there is none then.
        """
        if os.fstat(descriptor).st_size < num_bytes:
            os.close(descriptor)
            raise ProtocolError(f"segment {number} has not the {num_bytes} bytes announced")
        segment = self._segments[number] = Segment(descriptor, num_bytes)
        with suppress(OSError):
            segment.map()
        return segment

    def drop(self, number: int) -> Segment:
        """Forget a segment; it is unmapped with the last reference to it."""
        if number not in self._segments:
            raise ProtocolError(f"segment {number} is not there")
        return self._segments.pop(number)

    def place(self, job: Job) -> PlacedJob:
        """
        Raises:
            ProtocolError: the slice is not within a segment, or too small for the job's tensors.
        """
        memory, layout = job.memory, Layout.of(job.problem)
        segment = self._segments.get(memory.segment)
        end = memory.offset + memory.num_bytes
        if segment is None or end > segment.num_bytes or layout.total_bytes > memory.num_bytes:
            raise ProtocolError(f"{memory} does not hold the {layout.total_bytes} bytes of a job")
        return PlacedJob(job, layout, segment)


def field_of(memory: torch.Tensor, field: Field) -> torch.Tensor:
    """The tensor at ``field`` of a slice, uint8 on any device, without a copy."""
    return memory[field.offset : field.offset + field.num_bytes].view(field.dtype).view(field.shape)


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """The tensors of one varlen call. q, k, v: [tokens, heads, dim].

    gates: [tokens, heads, 3], or 0 instead of 3; block_indices: None when dense or not yet chosen.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor
    block_indices: torch.Tensor | None


def pack_inputs(layouts: Sequence[Layout], memories: Sequence[torch.Tensor]) -> PackedInputs:
    """The jobs' inputs one after the other; of one job: views of its memory, uncopied."""

    def joined(fields: Iterable[Field]) -> torch.Tensor:
        tensors = [field_of(memory, field) for memory, field in zip(memories, fields, strict=True)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    return PackedInputs(
        q=joined(layout.q for layout in layouts),
        k=joined(layout.k for layout in layouts),
        v=joined(layout.v for layout in layouts),
        gates=joined(layout.gates for layout in layouts),
        block_indices=_pack_block_indices(layouts, memories),
    )


def _pack_block_indices(layouts: Sequence[Layout], memories: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """int32 [index_heads, tokens, slots of the widest job]. Ids count from their own sequence: no shift."""
    if not layouts[0].takes_blocks:
        return None
    num_slots = max(layout.block_indices.shape[2] for layout in layouts)
    rows = []
    for layout, memory in zip(layouts, memories, strict=True):
        indices = field_of(memory, layout.block_indices)
        missing = num_slots - indices.shape[2]
        rows.append(F.pad(indices, (0, missing), value=-1) if missing else indices)
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


@dataclass(frozen=True, slots=True)
class PackedOutputs:
    """What one varlen call answers. out: [tokens, heads, dim]; lse: [tokens, heads], where there is one.

    block_indices: int32 [heads, tokens, slots], where they were chosen.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    block_indices: torch.Tensor | None = None


def unpack_outputs(jobs: Sequence[PlacedJob], outputs: PackedOutputs) -> None:
    """Copy each job's rows of the outputs into its slice; from a GPU: in the current stream."""
    start = 0
    for placed in jobs:
        end = start + placed.job.problem.num_q_tokens
        layout = placed.layout
        parts = [(layout.out, outputs.out[start:end])]
        if outputs.lse is not None:
            parts.append((layout.lse, outputs.lse[start:end]))
        if outputs.block_indices is not None:
            parts.append((layout.block_indices, outputs.block_indices[:, start:end]))
        for field, rows in parts:
            field_of(placed.memory, field).copy_(rows, non_blocking=True)
        start = end


def host_cu_seqlens(jobs: Sequence[PlacedJob]) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens of queries and of keys, int32 [sequences of all jobs + 1], on the host."""
    return (
        _joined_cu_seqlens(jobs, [placed.layout.cu_seqlens_q for placed in jobs]),
        _joined_cu_seqlens(jobs, [placed.layout.cu_seqlens_k for placed in jobs]),
    )


def _joined_cu_seqlens(jobs: Sequence[PlacedJob], fields: Sequence[Field]) -> torch.Tensor:
    if len(jobs) == 1:
        return field_of(jobs[0].memory, fields[0])
    # numpy: on arrays this small torch spends ten times as long, and this runs once a job.
    parts, offset = [np.zeros(1, np.int32)], 0
    for placed, field in zip(jobs, fields, strict=True):
        job_bytes = placed.memory.numpy()[field.offset : field.offset + field.num_bytes]
        starts = job_bytes.view(np.int32)
        parts.append(starts[1:] + np.int32(offset))
        offset += int(starts[-1])
    return torch.from_numpy(np.concatenate(parts))

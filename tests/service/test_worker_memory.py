import os
from dataclasses import replace

import pytest
import torch

from service.arena import ArenaPool
from service.job import Job, Slice
from service.records import ProtocolError
from service.worker_memory import (
    PackedOutputs,
    PlacedJob,
    Segment,
    Segments,
    host_cu_seqlens,
    pack_inputs,
    unpack_outputs,
)
from tests.jobs import DENSE, SELECTED, Request


@pytest.fixture
def pool() -> ArenaPool:
    return ArenaPool(1 << 20, segment_bytes=1 << 18, initial_bytes=1 << 18)


@pytest.fixture
def segments(pool: ArenaPool) -> Segments:
    """The worker's own mapping of the same memory."""
    mapped = Segments()
    for number, segment in pool.segments().items():
        mapped.add(number, os.dup(segment.fd), segment.num_bytes)
    return mapped


def placed(segments: Segments, requests: list[Request]) -> list[PlacedJob]:
    return [segments.place(request.job) for request in requests]


def test_a_batch_of_one_is_not_copied(pool: ArenaPool, segments: Segments) -> None:
    request = Request.write(pool, SELECTED, 0)
    (job,) = jobs = placed(segments, [request])
    inputs = pack_inputs([job.layout], [job.memory])
    assert inputs.block_indices is not None
    start = job.memory.data_ptr()
    cu_seqlens_q, cu_seqlens_k = host_cu_seqlens(jobs)
    for tensor, field in (
        (inputs.q, job.layout.q),
        (inputs.k, job.layout.k),
        (inputs.v, job.layout.v),
        (inputs.block_indices, job.layout.block_indices),
        (cu_seqlens_q, job.layout.cu_seqlens_q),
        (cu_seqlens_k, job.layout.cu_seqlens_k),
    ):
        assert tensor.data_ptr() == start + field.offset
        assert tensor.shape == field.shape


def test_jobs_are_packed_one_after_the_other(pool: ArenaPool, segments: Segments) -> None:
    requests = [Request.write(pool, SELECTED, seed) for seed in range(4)]
    jobs = placed(segments, requests)
    inputs = pack_inputs([job.layout for job in jobs], [job.memory for job in jobs])
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(inputs, name), torch.cat([request.tensor(name) for request in requests]))
    for name, cu_seqlens in zip(("cu_seqlens_q", "cu_seqlens_k"), host_cu_seqlens(jobs), strict=True):
        lengths = torch.cat([request.tensor(name).diff() for request in requests])
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[0] == 0
        assert torch.equal(cu_seqlens.diff(), lengths)


def test_narrow_selections_are_padded_to_the_widest(pool: ArenaPool, segments: Segments) -> None:
    requests = [Request.write(pool, SELECTED, seed) for seed in range(6)]
    widths = [request.problem.num_slots for request in requests]
    assert len(set(widths)) > 1
    jobs = placed(segments, requests)
    indices = pack_inputs([job.layout for job in jobs], [job.memory for job in jobs]).block_indices
    assert indices is not None
    assert indices.shape == (2, sum(request.problem.num_q_tokens for request in requests), max(widths))
    start = 0
    for request, width in zip(requests, widths, strict=True):
        rows = indices[:, start : start + request.problem.num_q_tokens]
        assert torch.equal(rows[..., :width], request.tensor("block_indices"))
        assert (rows[..., width:] == -1).all()
        start += request.problem.num_q_tokens


def test_a_job_without_queries_hides_no_selection(pool: ArenaPool, segments: Segments) -> None:
    """Its indices take no byte, wherever it comes in the batch."""
    empty, request = Request.without_queries(pool, SELECTED), Request.write(pool, SELECTED, 0)
    for requests in ([empty, request], [request, empty]):
        jobs = placed(segments, requests)
        indices = pack_inputs([job.layout for job in jobs], [job.memory for job in jobs]).block_indices
        assert indices is not None
        assert torch.equal(indices[..., : request.problem.num_slots], request.tensor("block_indices"))


def test_dense_jobs_have_no_selection(pool: ArenaPool, segments: Segments) -> None:
    jobs = placed(segments, [Request.write(pool, DENSE, seed) for seed in range(2)])
    assert pack_inputs([job.layout for job in jobs], [job.memory for job in jobs]).block_indices is None


def test_each_job_gets_its_own_rows_back(pool: ArenaPool, segments: Segments) -> None:
    requests = [Request.write(pool, SELECTED, seed) for seed in range(3)]
    num_tokens = sum(request.problem.num_q_tokens for request in requests)
    out = torch.randn(num_tokens, SELECTED.num_q_heads, SELECTED.value_dim).to(SELECTED.dtype)
    lse = torch.randn(num_tokens, SELECTED.num_q_heads)
    unpack_outputs(placed(segments, requests), PackedOutputs(out, lse))
    assert torch.equal(torch.cat([request.tensor("out") for request in requests]), out)
    assert torch.equal(torch.cat([request.tensor("lse") for request in requests]), lse)


def test_a_job_outside_its_memory_is_refused(pool: ArenaPool, segments: Segments) -> None:
    job = Request.write(pool, SELECTED, 0).job
    memory = job.memory
    segment_bytes = pool.segment_bytes
    for wrong in (
        replace(memory, segment=99),
        replace(memory, offset=segment_bytes),
        replace(memory, offset=segment_bytes - memory.num_bytes + 256),
        replace(memory, num_bytes=memory.num_bytes - 256),
        Slice(memory.segment, 2**63, 2**63),
    ):
        with pytest.raises(ProtocolError, match="does not hold"):
            segments.place(Job(job.problem, wrong))
    huge = replace(job.problem, num_q_tokens=2**63)
    with pytest.raises(ProtocolError, match="does not hold"):
        segments.place(Job(huge, memory))


def test_a_segment_smaller_than_announced_is_refused_and_its_descriptor_closed() -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(ProtocolError, match="announced"):
        Segments().add(0, descriptor, 8192)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_descriptor_is_closed_with_its_segment_mapped_or_not() -> None:
    descriptors = [os.memfd_create("test") for _ in range(2)]
    for descriptor in descriptors:
        os.ftruncate(descriptor, 4096)
    segments = [Segment(descriptor, 4096) for descriptor in descriptors]
    segments[0].map()
    segments.clear()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_dropping_what_is_not_there_is_refused(segments: Segments) -> None:
    segments.drop(0)
    with pytest.raises(ProtocolError, match="not there"):
        segments.drop(0)

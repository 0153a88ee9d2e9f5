"""Executors in this process; through a worker process: test_worker_client.py."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from service.arena import ArenaPool
from service.executor import CpuExecutor, CudaExecutor, Executor, failure_kind
from service.records import Done, Failed, FailureKind, Memory, Record
from service.worker_memory import Segments
from tests.jobs import DENSE, SELECTED, Request


@pytest.fixture
def pool() -> ArenaPool:
    return ArenaPool(64 << 20, segment_bytes=16 << 20, initial_bytes=16 << 20)


@pytest.fixture
def reports() -> list[Record]:
    return []


@pytest.fixture
def executor(device: torch.device, reports: list[Record]) -> Executor:
    kind = CudaExecutor if device.type == "cuda" else CpuExecutor
    return kind(0, "auto", reports.append)


@pytest.fixture
def segments(pool: ArenaPool, executor: Executor) -> Iterator[Segments]:
    segments = Segments()
    for number, segment in pool.segments().items():
        executor.pin(segments.add(number, os.dup(segment.fd), segment.num_bytes))
    yield segments
    for number in pool.segments():
        executor.unpin(segments.drop(number))


def test_batches_in_flight_at_once_are_all_right(
    pool: ArenaPool,
    segments: Segments,
    executor: Executor,
    reports: list[Record],
    device: torch.device,
) -> None:
    """On a GPU nothing waits between the batches, so memory that a stream still reads is found out."""
    batches = [
        [Request.write(pool, SELECTED if batch % 3 else DENSE, 10 * batch + i) for i in range(batch % 4 + 1)]
        for batch in range(12)
    ]
    for batch, requests in enumerate(batches):
        executor.submit(batch, [segments.place(request.job) for request in requests])
    executor.drain()
    done = [record for record in reports if isinstance(record, Done)]
    assert [record.batch for record in done] == list(range(12))
    assert all(record.kernel_seconds > 0 for record in done)
    assert all(request.is_answered(str(device)) for requests in batches for request in requests)


def test_a_batch_that_raises_is_reported_and_the_next_is_taken(
    pool: ArenaPool, device: torch.device, segments: Segments, reports: list[Record]
) -> None:
    kind = CudaExecutor if device.type == "cuda" else CpuExecutor
    executor = kind(0, "no such backend", reports.append)
    request = Request.write(pool, SELECTED, 1)
    for batch in range(2):
        executor.submit(batch, [segments.place(request.job)])
    executor.drain()
    assert [(record.batch, record.kind) for record in reports if isinstance(record, Failed)] == [
        (0, FailureKind.ERROR),
        (1, FailureKind.ERROR),
    ]


def test_memory_is_reported_but_not_with_every_batch(
    pool: ArenaPool, segments: Segments, executor: Executor, reports: list[Record]
) -> None:
    request = Request.write(pool, SELECTED, 1)
    for batch in range(3):
        executor.submit(batch, [segments.place(request.job)])
    executor.drain()
    (memory,) = [record for record in reports if isinstance(record, Memory)]
    assert 0 < memory.used_bytes <= memory.total_bytes


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(1 << 50),
        lambda: np.empty(1 << 60, np.uint8),
        lambda: mmap.mmap(-1, 1 << 60),
    ],
    ids=["torch", "numpy", "mapping"],
)
def test_more_memory_than_the_host_has_is_out_of_memory(take: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        take()
    assert failure_kind(caught.value) is FailureKind.OOM


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("no kernel for this shape"), FailureKind.ERROR),
        (RuntimeError("shape mismatch"), FailureKind.ERROR),
        (OSError(errno.EMFILE, "too many open files"), FailureKind.ERROR),
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.OOM),
        (torch.AcceleratorError("an illegal memory access was encountered"), FailureKind.FATAL),
        (RuntimeError("CUDA error: unspecified launch failure"), FailureKind.FATAL),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), FailureKind.FATAL),
    ],
    ids=lambda value: getattr(value, "name", None) or type(value).__name__,
)
def test_only_errors_of_the_device_end_the_worker(error: Exception, kind: FailureKind) -> None:
    assert failure_kind(error) is kind

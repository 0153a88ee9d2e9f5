"""Runs batches on one device, and puts each job's answer into its slice of the arena."""

import errno
import logging
import os
import platform
import queue
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import torch

from fsa_core.api import attend
from fsa_core.nsa.selecting import SelectingProblem, select_and_attend
from service.devices import DeviceInfo
from service.job import packed
from service.records import Done, Failed, FailureKind, Memory, Record
from service.worker_memory import (
    PackedInputs,
    PackedOutputs,
    PlacedJob,
    Segment,
    host_cu_seqlens,
    pack_inputs,
    unpack_outputs,
)

log = logging.getLogger("fsa.worker")

FATAL_EXIT_CODE = 70
MEMORY_INTERVAL_SECONDS = 2.0
_NO_HOST_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
)

Report = Callable[[Record], None]


class Executor(ABC):
    """One device. Every batch ends in one Done or Failed, given to ``report`` from any thread."""

    def __init__(self, index: int, backend: str, report: Report) -> None:
        self.index = index
        self._backend = backend
        self._report = report
        self._memory_reported_at = -MEMORY_INTERVAL_SECONDS

    @abstractmethod
    def describe(self) -> DeviceInfo:
        """What the device is."""

    @abstractmethod
    def submit(self, batch: int, jobs: Sequence[PlacedJob]) -> None:
        """Run a batch, or queue it on the device."""

    @abstractmethod
    def memory(self) -> Memory:
        """How much memory of the device is in use."""

    @abstractmethod
    def pin(self, segment: Segment) -> None:
        """Prepare a segment for transfers; one that is mapped only later does without, and is slower."""

    @abstractmethod
    def unpin(self, segment: Segment) -> None:
        """Undo ``pin``, before the segment is unmapped."""

    @abstractmethod
    def drain(self) -> None:
        """Return when every submitted batch was reported."""

    def _attend(
        self,
        jobs: Sequence[PlacedJob],
        inputs: PackedInputs,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
    ) -> PackedOutputs:
        problem = packed([placed.job.problem for placed in jobs])
        qkv, starts = (inputs.q, inputs.k, inputs.v), (cu_seqlens_q, cu_seqlens_k)
        if isinstance(problem, SelectingProblem):
            gates = inputs.gates if problem.is_gated else None
            selected = select_and_attend(problem, *qkv, gates, *starts, backend=self._backend)
            return PackedOutputs(selected.out, selected.lse, selected.block_indices)
        return PackedOutputs(*attend(problem, *qkv, inputs.block_indices, *starts, backend=self._backend))

    def _finish(self, done: Done) -> None:
        self._report(done)
        now = time.monotonic()
        if now - self._memory_reported_at >= MEMORY_INTERVAL_SECONDS:
            self._memory_reported_at = now
            self._report(self.memory())

    def _fail(self, batch: int, error: Exception) -> None:
        kind = failure_kind(error)
        if kind is FailureKind.FATAL:
            self._die(batch, error)
        log.error("batch failed", extra={"batch": batch, "kind": kind.name.lower()}, exc_info=error)
        self._report(Failed(batch, kind, _describe(error)))

    def _die(self, batch: int, error: Exception) -> NoReturn:
        """A CUDA error stays with its process: whatever ran next would fail too, or worse, not fail."""
        log.critical("the device is lost, the worker ends", extra={"batch": batch}, exc_info=error)
        with suppress(EOFError):
            self._report(Failed(batch, FailureKind.FATAL, _describe(error)))
        # Not sys.exit: other threads, and the driver's own clean-up, may wait for the device for ever.
        os._exit(FATAL_EXIT_CODE)


def failure_kind(error: Exception) -> FailureKind:
    if _is_out_of_memory(error):
        return FailureKind.OOM
    # Triton and cuBLAS have no type of their own for an error of the driver.
    of_driver = "CUDA error" in str(error) or "Error [CUDA]" in str(error)
    is_fatal = of_driver or isinstance(error, torch.AcceleratorError)
    return FailureKind.FATAL if is_fatal else FailureKind.ERROR


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # On the CPU torch has no type of its own for it.
    is_of_host = any(text in str(error) for text in _NO_HOST_MEMORY)
    return is_of_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class CpuExecutor(Executor):
    """Computes in the calling thread; torch spreads the work over its own threads."""

    def describe(self) -> DeviceInfo:
        return _device_info("cpu", self.index, _cpu_name(), self.memory().total_bytes)

    def submit(self, batch: int, jobs: Sequence[PlacedJob]) -> None:
        try:
            done = self._run(batch, jobs)
        except Exception as error:
            self._fail(batch, error)
        else:
            self._finish(done)

    def memory(self) -> Memory:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as statm:
            resident_pages = int(statm.read().split()[1])
        return Memory(resident_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)

    def pin(self, segment: Segment) -> None:
        """Nothing to do: the CPU reads the arena itself."""

    def unpin(self, segment: Segment) -> None:
        """Nothing was done."""

    def drain(self) -> None:
        """Nothing to wait for: ``submit`` returns when the batch was reported."""

    def _run(self, batch: int, jobs: Sequence[PlacedJob]) -> Done:
        started = time.perf_counter()
        inputs = pack_inputs([placed.layout for placed in jobs], [placed.memory for placed in jobs])
        cu_seqlens_q, cu_seqlens_k = host_cu_seqlens(jobs)
        copied_in = time.perf_counter()
        outputs = self._attend(jobs, inputs, cu_seqlens_q, cu_seqlens_k)
        computed = time.perf_counter()
        unpack_outputs(jobs, outputs)
        ended = time.perf_counter()
        return Done(batch, copied_in - started, computed - copied_in, ended - computed)


@dataclass(frozen=True, slots=True)
class _Stage:
    """The events around one stage of a batch in its stream."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    @classmethod
    def create(cls) -> "_Stage":
        # A waiting thread sleeps instead of spinning: the host's cores have requests to decode.
        return cls(*(torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)))

    def seconds(self) -> float:
        milliseconds: float = self.start.elapsed_time(self.end)
        return milliseconds / 1e3


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A batch whose work is queued on the device.

    ``held``: every tensor that more than one stream touches, kept until all of them are done with it, which
    is what lets the allocator reuse memory across streams without being told of each use.
    """

    batch: int
    h2d: _Stage
    kernel: _Stage
    d2h: _Stage
    held: tuple[object, ...]


class CudaExecutor(Executor):
    """Copies in, computes and copies out on three streams, so that batch n+1 copies while n computes.

    ``submit`` only queues; a thread waits for the device and reports.
    """

    def __init__(self, index: int, backend: str, report: Report) -> None:
        super().__init__(index, backend, report)
        # The only GPU this process sees, whatever its number among the front end's.
        self._device = torch.device("cuda", 0)
        torch.cuda.set_device(self._device)
        self._copy_in = torch.cuda.Stream(self._device)
        self._compute = torch.cuda.Stream(self._device)
        self._copy_out = torch.cuda.Stream(self._device)
        self._pinned: set[Segment] = set()
        self._in_flight: queue.SimpleQueue[_InFlight | None] = queue.SimpleQueue()
        self._completer = threading.Thread(target=self._complete, name="fsa-completer", daemon=True)
        self._completer.start()

    def describe(self) -> DeviceInfo:
        properties = torch.cuda.get_device_properties(self._device)
        return _device_info("cuda", self.index, properties.name, properties.total_memory)

    def submit(self, batch: int, jobs: Sequence[PlacedJob]) -> None:
        try:
            self._in_flight.put(self._enqueue(batch, jobs))
        except Exception as error:
            if failure_kind(error) is not FailureKind.FATAL:
                self._settle(batch, error)
            self._fail(batch, error)

    def memory(self) -> Memory:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return Memory(total_bytes - free_bytes, total_bytes)

    def pin(self, segment: Segment) -> None:
        if segment.is_mapped:
            status = torch.cuda.cudart().cudaHostRegister(segment.map().data_ptr(), segment.num_bytes, 0)
            torch.cuda.check_error(status)
            self._pinned.add(segment)

    def unpin(self, segment: Segment) -> None:
        if segment in self._pinned:
            self._pinned.remove(segment)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(segment.map().data_ptr()))

    def drain(self) -> None:
        self._in_flight.put(None)
        self._completer.join()

    def _enqueue(self, batch: int, jobs: Sequence[PlacedJob]) -> _InFlight:
        h2d, kernel, d2h = _Stage.create(), _Stage.create(), _Stage.create()
        with torch.cuda.stream(self._copy_in):
            h2d.start.record()
            staged = self._stage_inputs(jobs)
            cu_seqlens_q, cu_seqlens_k = (
                cu_seqlens.pin_memory().to(self._device, non_blocking=True)
                for cu_seqlens in host_cu_seqlens(jobs)
            )
            h2d.end.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(h2d.end)
            kernel.start.record()
            inputs = pack_inputs([placed.layout for placed in jobs], staged)
            outputs = self._attend(jobs, inputs, cu_seqlens_q, cu_seqlens_k)
            kernel.end.record()
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(kernel.end)
            d2h.start.record()
            unpack_outputs(jobs, outputs)
            d2h.end.record()
        return _InFlight(batch, h2d, kernel, d2h, (staged, cu_seqlens_q, cu_seqlens_k, inputs, outputs))

    def _stage_inputs(self, jobs: Sequence[PlacedJob]) -> list[torch.Tensor]:
        """Each job's inputs on the device, laid out as in its slice: one transfer a job, not one a tensor.

        Packing them there costs little: the device's memory is about 80 times faster than the bus.
        """
        ends = [placed.layout.input_bytes for placed in jobs]
        buffer = torch.empty(sum(ends), dtype=torch.uint8, device=self._device)
        staged = list(torch.split(buffer, ends))
        for target, placed in zip(staged, jobs, strict=True):
            target.copy_(placed.memory[: target.numel()], non_blocking=True)
        return staged

    def _settle(self, batch: int, failure: Exception) -> None:
        """After a batch failed half queued: when this returns, the device no longer touches its slices."""
        try:
            torch.cuda.synchronize(self._device)
            # The frames of the failure hold the batch's tensors.
            traceback.clear_frames(failure.__traceback__)
            torch.cuda.empty_cache()
        except Exception as error:
            self._die(batch, error)

    def _complete(self) -> None:
        while (running := self._in_flight.get()) is not None:
            batch = running.batch
            try:
                running.d2h.end.synchronize()
                times = (running.h2d.seconds(), running.kernel.seconds(), running.d2h.seconds())
                # Its device memory is free before the front end sends the next batch.
                del running
                self._finish(Done(batch, *times))
            except EOFError:
                # The front end is gone; the receiving thread hears of it too.
                return
            except Exception as error:
                self._die(batch, error)


def _device_info(kind: str, index: int, name: str, memory_bytes: int) -> DeviceInfo:
    try:
        triton_version = version("triton")
    except PackageNotFoundError:
        triton_version = ""
    return DeviceInfo(
        kind, index, name, memory_bytes, torch.__version__, triton_version, torch.version.cuda or ""
    )


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()

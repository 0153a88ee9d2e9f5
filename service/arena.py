"""Shared memory for request payloads: sealed memfd segments, cut into slices."""

import asyncio
import fcntl
import mmap
import os
import threading
from bisect import bisect
from collections.abc import Callable
from itertools import count

import numpy as np

from service.job import ALIGNMENT_BYTES, Slice

SEGMENT_BYTES = 64 << 20


class ArenaFull(Exception):
    """The pool's capacity is in use: try again when requests have finished."""


class MachineFull(ArenaFull):
    """The machine has not the memory that the pool may still take."""


class Segment:
    """One memfd, mapped and touched, that can no longer change its size.

    Lives as long as anything refers to it: the pool, a lease, or a message that carries its descriptor.
    """

    def __init__(self, number: int, num_bytes: int) -> None:
        """Costs about a second a GiB: the kernel finds and clears every page now, not under a request.

        Raises:
            OSError: the machine has not that much memory.
        """
        self.number = number
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("fsa-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, num_bytes)
        # A page that cannot be had is an OSError here; at first touch it would be a SIGBUS.
        os.posix_fallocate(self.fd, 0, num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = memoryview(mmap.mmap(self.fd, num_bytes))
        # Fills the page table, with the GIL released.
        np.frombuffer(self.memory, np.uint8)[:: mmap.PAGESIZE] = 0

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class FreeList:
    """The free runs of one segment, first fit, neighbours merged."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._runs = [(0, num_bytes)]

    @property
    def is_unused(self) -> bool:
        return self._runs == [(0, self.num_bytes)]

    def take(self, num_bytes: int) -> int | None:
        """The offset of ``num_bytes`` that are free no more, or None."""
        for i, (offset, size) in enumerate(self._runs):
            if size >= num_bytes:
                self._runs[i : i + 1] = [(offset + num_bytes, size - num_bytes)] if size > num_bytes else []
                return offset
        return None

    def give(self, offset: int, num_bytes: int) -> None:
        runs = self._runs
        i = bisect(runs, (offset, 0))
        if i < len(runs) and runs[i][0] == offset + num_bytes:
            num_bytes += runs.pop(i)[1]
        if i > 0 and sum(runs[i - 1]) == offset:
            i -= 1
            offset, before_bytes = runs.pop(i)
            num_bytes += before_bytes
        runs.insert(i, (offset, num_bytes))


class Lease:
    """One request's memory, held until ``release``.

    Release only once the batch that the request rode in has resolved (or was never submitted): until then a
    worker may still write here.
    """

    def __init__(self, pool: "ArenaPool", segment: Segment, memory: Slice) -> None:
        self.memory = memory
        self._pool = pool
        self._segment: Segment | None = segment

    def view(self) -> memoryview:
        """The ``memory.num_bytes`` bytes, writable. Must not be used after ``release``."""
        if self._segment is None:
            raise ValueError("the lease was released")
        return self._segment.memory[self.memory.offset : self.memory.offset + self.memory.num_bytes]

    def release(self) -> None:
        """Give the bytes back. Idempotent, from any thread."""
        self._pool._give_back(self)


class ArenaPool:
    """Sub-allocates slices, aligned to 256 bytes, first fit, from segments made as they are needed.

    Standard segments are for requests that fit one. A larger request makes a larger segment, where others of
    the kind find room as well. Small ones go there only where no segment of theirs can be made. Unused
    segments are dropped only when the capacity is wanted for another.
    """

    def __init__(
        self, capacity_bytes: int, *, segment_bytes: int = SEGMENT_BYTES, initial_bytes: int = 0
    ) -> None:
        """``initial_bytes`` (whole segments of them) are made and touched here, about a second a GiB."""
        self.capacity_bytes = capacity_bytes
        self.segment_bytes = min(segment_bytes, capacity_bytes)
        self._lock = threading.Lock()
        self._numbers = count()
        self._segments: dict[int, Segment] = {}
        self._free: dict[int, FreeList] = {}
        self._used_bytes = 0
        self._committed_bytes = 0
        self._generation = 0
        self._listeners: list[Callable[[], None]] = []
        while self._committed_bytes + self.segment_bytes <= min(initial_bytes, capacity_bytes):
            self._committed_bytes += self.segment_bytes
            self._add(Segment(next(self._numbers), self.segment_bytes))

    @property
    def used_bytes(self) -> int:
        """Bytes in leases now, rounded up to the alignment."""
        return self._used_bytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of all segments, leased or not: what the pool takes from the machine."""
        return self._committed_bytes

    @property
    def generation(self) -> int:
        """Grows with every change of ``segments``."""
        return self._generation

    def segments(self) -> dict[int, Segment]:
        """The live segments by number. A number is never used again."""
        with self._lock:
            return dict(self._segments)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener``, in whichever thread, after each change of ``segments``."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        self._listeners.remove(listener)

    def try_allocate(self, num_bytes: int) -> Lease | None:
        """A lease from memory that exists, in microseconds, or None where a segment must be made first."""
        num_bytes = _round_up(max(num_bytes, 1), ALIGNMENT_BYTES)
        with self._lock:
            return self._take(self._candidates(num_bytes), num_bytes)

    def allocate(self, num_bytes: int) -> Lease:
        """A lease of ``num_bytes``; may take a millisecond a MiB of new segment, so not in an event loop.

        Raises:
            ArenaFull: over ``capacity_bytes``, or MachineFull.
        """
        return self.try_allocate(num_bytes) or self._grow(num_bytes)

    async def acquire(self, num_bytes: int) -> Lease:
        """``allocate`` for the event loop: at once from existing memory, else grown in a thread.

        Nothing leaks when the caller is cancelled while it waits.
        """
        lease = self.try_allocate(num_bytes)
        if lease is not None:
            return lease
        growing = asyncio.get_running_loop().run_in_executor(None, self._grow, num_bytes)
        try:
            return await asyncio.shield(growing)
        except asyncio.CancelledError:
            growing.add_done_callback(_release_unwanted)
            raise

    def _candidates(self, num_bytes: int) -> list[int]:
        """Segments that are for a request of this size: standard ones by age, or larger ones by size."""
        if num_bytes <= self.segment_bytes:
            return [n for n, s in self._segments.items() if s.num_bytes == self.segment_bytes]
        return self._by_size(num_bytes)

    def _by_size(self, num_bytes: int) -> list[int]:
        large = [s for s in self._segments.values() if s.num_bytes >= num_bytes]
        return [s.number for s in sorted(large, key=lambda s: s.num_bytes)]

    def _take(self, numbers: list[int], num_bytes: int) -> Lease | None:
        for number in numbers:
            offset = self._free[number].take(num_bytes)
            if offset is not None:
                return self._lease(number, offset, num_bytes)
        return None

    def _lease(self, number: int, offset: int, num_bytes: int) -> Lease:
        self._used_bytes += num_bytes
        return Lease(self, self._segments[number], Slice(number, offset, num_bytes))

    def _grow(self, num_bytes: int) -> Lease:
        """Lease the start of a new segment. Only its bytes are reserved under the lock, not its touching."""
        num_bytes = _round_up(max(num_bytes, 1), ALIGNMENT_BYTES)
        try:
            new_bytes = self._reserved(num_bytes)
        except ArenaFull:
            with self._lock:
                lease = self._take(self._by_size(num_bytes), num_bytes)
            if lease is None:
                raise
            return lease
        try:
            segment = Segment(next(self._numbers), new_bytes)
        except OSError as error:
            with self._lock:
                self._committed_bytes -= new_bytes
                lease = self._take(self._by_size(num_bytes), num_bytes)
            if lease is not None:
                return lease
            raise MachineFull(
                f"the machine has no {new_bytes} bytes for a segment: {error.strerror}"
            ) from error
        with self._lock:
            self._add(segment)
            self._free[segment.number].take(num_bytes)
            lease = self._lease(segment.number, 0, num_bytes)
        self._tell_listeners()
        return lease

    def _reserved(self, num_bytes: int) -> int:
        """How large the new segment for so many bytes will be.

        Whole multiples of a segment, so that the next large request of about this size fits too. Where they
        find no room: what this one takes.
        """
        new_bytes = max(min(_round_up(num_bytes, self.segment_bytes), self.capacity_bytes), num_bytes)
        try:
            self._reserve(new_bytes)
        except ArenaFull:
            if new_bytes == num_bytes or num_bytes <= self.segment_bytes:
                raise
            new_bytes = num_bytes
            self._reserve(new_bytes)
        return new_bytes

    def _reserve(self, new_bytes: int) -> None:
        with self._lock:
            unused = [s for s in self._segments.values() if self._free[s.number].is_unused]
            excess = self._committed_bytes + new_bytes - self.capacity_bytes
            if excess > sum(s.num_bytes for s in unused):
                raise ArenaFull(
                    f"{new_bytes} bytes more than the {self._used_bytes} in use do not fit the capacity of "
                    f"{self.capacity_bytes}"
                )
            dropped = excess > 0
            while excess > 0:
                segment = unused.pop()
                del self._segments[segment.number], self._free[segment.number]
                self._committed_bytes -= segment.num_bytes
                excess -= segment.num_bytes
            self._committed_bytes += new_bytes
            self._generation += dropped
        if dropped:
            self._tell_listeners()

    def _add(self, segment: Segment) -> None:
        self._segments[segment.number] = segment
        self._free[segment.number] = FreeList(segment.num_bytes)
        self._generation += 1

    def _tell_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            if lease._segment is None:
                return
            lease._segment = None
            memory = lease.memory
            self._free[memory.segment].give(memory.offset, memory.num_bytes)
            self._used_bytes -= memory.num_bytes


def _round_up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


def _release_unwanted(growing: asyncio.Future[Lease]) -> None:
    if not growing.cancelled() and growing.exception() is None:
        growing.result().release()

"""Shared memory for request payloads: sealed memfd segments, cut into slices."""

import asyncio
from collections.abc import Callable

from service.job import ALIGNMENT_BYTES, Slice

SEGMENT_BYTES = 64 << 20


class ArenaFull(Exception):
    """The pool holds its capacity already: the caller may try again when requests have finished."""


class Lease:
    """One request's memory, held until ``release``.

    Release only once the batch that the request rode in has resolved (or was never submitted): until then a
    worker may still write here.
    """

    memory: Slice

    def view(self) -> memoryview:
        """The ``memory.num_bytes`` bytes, writable. Must not be used after ``release``."""
        raise NotImplementedError

    def release(self) -> None:
        """Give the bytes back. Idempotent, from any thread."""
        raise NotImplementedError


class ArenaPool:
    """Sub-allocates slices, aligned to 256 bytes, first fit, from segments made as they are needed."""

    def __init__(
        self, capacity_bytes: int, *, segment_bytes: int = SEGMENT_BYTES, initial_bytes: int = 0
    ) -> None:
        """``initial_bytes`` are made and touched here: about a second a GiB, once, before serving."""

    @property
    def capacity_bytes(self) -> int:
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        """Bytes in leases now."""
        raise NotImplementedError

    def try_allocate(self, num_bytes: int) -> Lease | None:
        """A lease from memory that exists, in microseconds, or None where a segment must be made first."""
        raise NotImplementedError

    def allocate(self, num_bytes: int) -> Lease:
        """A lease of ``num_bytes``; may take a millisecond a MiB of new segment, so not in an event loop.

        Raises:
            ArenaFull: over ``capacity_bytes``.
        """
        raise NotImplementedError

    async def acquire(self, num_bytes: int) -> Lease:
        """``allocate`` for the event loop: at once from existing memory, else grown in a thread.

        Nothing leaks when the caller is cancelled while it waits.
        """
        raise NotImplementedError

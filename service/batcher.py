"""Which queued requests ride together: pure bookkeeping, without clocks, tasks or processes."""

from bisect import insort
from dataclasses import dataclass, field, replace

from fsa_core.problem import Problem
from service.job import Job, compatible


@dataclass(eq=False, slots=True)
class Entry:
    """One request in the queue. Times are of the clock that ``next_batch`` is given, in seconds."""

    job: Job
    priority: int
    arrived: float
    deadline: float | None = None
    cancelled: bool = False
    key: Problem = field(init=False)

    def __post_init__(self) -> None:
        self.key = compatible(self.job.problem)

    @property
    def num_tokens(self) -> int:
        """Query and key tokens: what a batch's work grows with."""
        return self.job.problem.num_q_tokens + self.job.problem.num_k_tokens

    def due_at(self, delay_seconds: float) -> float:
        """Until when it waits for company: for the delay, but no longer than half of the time that it has.

        The other half is for the work: how long that takes is not known before.
        """
        if self.deadline is not None:
            delay_seconds = min(delay_seconds, (self.deadline - self.arrived) / 2)
        return self.arrived + delay_seconds

    def is_expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold. An entry that is over a limit by itself rides alone."""

    requests: int
    tokens: int
    num_bytes: int
    delay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Draw:
    """What ``next_batch`` took out of the queue: the batch, and those that are too late to start."""

    batch: list[Entry]
    expired: list[Entry]


class Batcher:
    """A queue ordered by priority, then arrival.

    The first entry chooses which kind of batch is next, so no kind can starve another of the same
    priority; compatible ones behind it fill the batch, in order, until one does not fit.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._queue: list[tuple[int, int, Entry]] = []
        self._added = 0

    def __len__(self) -> int:
        return sum(not entry.cancelled for _, _, entry in self._queue)

    def add(self, entry: Entry) -> None:
        """Queues ``entry``. Set its ``cancelled`` to have it dropped."""
        insort(self._queue, (-entry.priority, self._added, entry))
        self._added += 1

    def next_batch(self, now: float) -> Draw:
        """Takes the next batch, and everything cancelled or expired, out of the queue.

        The batch is empty when the queue is, or while every batch that could be formed still waits
        for company (until the first of its entries is due, unless it is full before).
        """
        expired = [e for _, _, e in self._queue if not e.cancelled and e.is_expired(now)]
        self._queue = [item for item in self._queue if not (item[2].cancelled or item[2].is_expired(now))]
        batch = self._first_due(now)
        taken = set(batch)
        self._queue = [item for item in self._queue if item[2] not in taken]
        return Draw(batch, expired)

    def due_at(self) -> float | None:
        """When the first entry will have waited for company long enough; None when none is queued."""
        delay_seconds = self._limits.delay_seconds
        return min((e.due_at(delay_seconds) for _, _, e in self._queue if not e.cancelled), default=None)

    def expect_no_company(self) -> None:
        """No entry waits for company any more."""
        self._limits = replace(self._limits, delay_seconds=0.0)

    def take_all(self) -> list[Entry]:
        """Empties the queue; returns what was in it and not cancelled."""
        entries = [e for _, _, e in self._queue if not e.cancelled]
        self._queue = []
        return entries

    def _first_due(self, now: float) -> list[Entry]:
        seen: set[Problem] = set()
        for _, _, head in self._queue:
            if head.key in seen:
                continue
            seen.add(head.key)
            batch, is_full = self._fill(head.key)
            if is_full or now >= min(entry.due_at(self._limits.delay_seconds) for entry in batch):
                return batch
        return []

    def _fill(self, key: Problem) -> tuple[list[Entry], bool]:
        """The entries of ``key`` that fit one batch, in order, and whether it can take no more."""
        batch: list[Entry] = []
        tokens = num_bytes = 0
        for _, _, entry in self._queue:
            if entry.key != key:
                continue
            tokens += entry.num_tokens
            num_bytes += entry.job.memory.num_bytes
            if batch and (tokens > self._limits.tokens or num_bytes > self._limits.num_bytes):
                return batch, True
            batch.append(entry)
            if len(batch) == self._limits.requests:
                return batch, True
        return batch, tokens >= self._limits.tokens or num_bytes >= self._limits.num_bytes

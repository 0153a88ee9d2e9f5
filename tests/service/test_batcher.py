"""What may ride together, in which order, and that nothing is lost on the way."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fsa_core.problem import Problem
from service.batcher import Batcher, BatchLimits, Entry
from service.job import Job, Slice
from tests.jobs import DENSE, SELECTED

LIMITS = BatchLimits(requests=4, tokens=100, num_bytes=1000)
KINDS = (SELECTED, replace(SELECTED, head_dim=64), DENSE)


def entry(
    tokens: int = 10,
    *,
    kind: Problem = SELECTED,
    num_bytes: int = 1,
    priority: int = 0,
    arrived: float = 0.0,
    deadline: float | None = None,
) -> Entry:
    problem = replace(kind, num_q_tokens=tokens // 2, num_k_tokens=tokens - tokens // 2)
    return Entry(Job(problem, Slice(0, 0, num_bytes)), priority, arrived, deadline)


def queued(*entries: Entry, limits: BatchLimits = LIMITS) -> Batcher:
    batcher = Batcher(limits)
    for each in entries:
        batcher.add(each)
    return batcher


def test_requests_that_differ_in_length_and_few_slots_only_ride_together() -> None:
    first, second = entry(10), entry(30, kind=replace(SELECTED, num_slots=7, num_sequences=3))
    assert queued(first, second).next_batch(0.0).batch == [first, second]


@pytest.mark.parametrize(
    "other",
    [
        replace(SELECTED, head_dim=64),
        replace(SELECTED, num_q_heads=2),
        replace(SELECTED, block_size=32),
        replace(SELECTED, causal=False),
        replace(SELECTED, softmax_scale=1.0),
        replace(SELECTED, num_slots=17),
        replace(SELECTED, query_block_size=64),
        DENSE,
    ],
    ids=str,
)
def test_incompatible_requests_ride_apart_in_order_of_arrival(other: Problem) -> None:
    first, second, third = entry(), entry(kind=other), entry()
    batcher = queued(first, second, third)
    assert batcher.next_batch(0.0).batch == [first, third]
    assert batcher.next_batch(0.0).batch == [second]
    assert batcher.next_batch(0.0).batch == []


def test_a_higher_priority_goes_first_and_arrival_decides_within_one() -> None:
    low, first, second = entry(60), entry(60, priority=2), entry(60, priority=2)
    batcher = queued(low, first, second)
    assert [batcher.next_batch(0.0).batch for _ in range(3)] == [[first], [second], [low]]


@pytest.mark.parametrize("over", [{"tokens": 101}, {"num_bytes": 1001}], ids=["tokens", "bytes"])
def test_a_request_over_the_budget_rides_alone(over: dict[str, int]) -> None:
    large, small = entry(**over), entry()
    assert queued(large, small).next_batch(0.0).batch == [large]
    batcher = queued(small, large)
    assert batcher.next_batch(0.0).batch == [small]
    assert batcher.next_batch(0.0).batch == [large]


def test_what_is_cancelled_or_late_is_dropped_and_only_the_late_are_reported() -> None:
    cancelled, late, kept = entry(), entry(deadline=5.0), entry(deadline=5.1)
    batcher = queued(cancelled, late, kept)
    cancelled.cancelled = True
    draw = batcher.next_batch(5.0)
    assert (draw.batch, draw.expired) == ([kept], [late])
    assert len(batcher) == 0


def test_a_batch_waits_for_company_no_longer_than_the_delay_and_not_when_full() -> None:
    limits = replace(LIMITS, delay_seconds=1.0)
    batcher = queued(entry(arrived=10.0), limits=limits)
    assert batcher.next_batch(10.9).batch == []
    assert batcher.due_at() == 11.0
    assert len(batcher.next_batch(11.0).batch) == 1
    assert batcher.due_at() is None
    full = queued(*(entry(arrived=10.0) for _ in range(LIMITS.requests)), limits=limits)
    assert len(full.next_batch(10.0).batch) == LIMITS.requests


def test_company_is_not_waited_for_longer_than_half_of_the_time_to_a_deadline() -> None:
    patient, hurried = entry(arrived=10.0, deadline=16.0), entry(arrived=10.0, deadline=10.8)
    limits = replace(LIMITS, delay_seconds=1.0)
    assert queued(patient, limits=limits).due_at() == 11.0
    batcher = queued(patient, hurried, limits=limits)
    due_at = batcher.due_at()
    assert due_at == pytest.approx(10.4)
    assert batcher.next_batch(10.39).batch == []
    assert batcher.next_batch(due_at).batch == [patient, hurried]


def test_where_no_company_is_expected_nothing_waits_for_it() -> None:
    batcher = queued(entry(arrived=10.0), limits=replace(LIMITS, delay_seconds=1.0))
    assert batcher.next_batch(10.0).batch == []
    batcher.expect_no_company()
    assert batcher.due_at() == 10.0
    assert len(batcher.next_batch(10.0).batch) == 1


def test_a_full_batch_does_not_wait_behind_one_that_waits_for_company() -> None:
    alone = entry(kind=DENSE)
    batcher = queued(alone, *(entry() for _ in range(4)), limits=replace(LIMITS, delay_seconds=1.0))
    assert len(batcher.next_batch(0.0).batch) == 4
    assert batcher.next_batch(1.0).batch == [alone]


def test_taking_all_leaves_out_the_cancelled() -> None:
    kept, cancelled = entry(), entry(kind=DENSE)
    batcher = queued(kept, cancelled)
    cancelled.cancelled = True
    assert batcher.take_all() == [kept]
    assert batcher.next_batch(0.0).batch == []


class BatcherMachine(RuleBasedStateMachine):
    """Any sequence of arrivals, cancellations, draws and passing time, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(LIMITS)
        self.waiting: list[Entry] = []
        self.now = 0.0

    @rule(
        tokens=st.integers(1, 120),
        kind=st.sampled_from(KINDS),
        num_bytes=st.integers(1, 1200),
        priority=st.integers(0, 2),
        patience=st.none() | st.floats(0.1, 5.0),
    )
    def arrive(
        self, tokens: int, kind: Problem, num_bytes: int, priority: int, patience: float | None
    ) -> None:
        new = entry(
            tokens,
            kind=kind,
            num_bytes=num_bytes,
            priority=priority,
            arrived=self.now,
            deadline=None if patience is None else self.now + patience,
        )
        self.waiting.append(new)
        self.batcher.add(new)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            victim = data.draw(st.sampled_from(self.waiting))
            victim.cancelled = True
            self.waiting.remove(victim)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def draw_batch(self) -> None:
        draw = self.batcher.next_batch(self.now)
        late = [e for e in self.waiting if e.is_expired(self.now)]
        in_time = [e for e in self.waiting if not e.is_expired(self.now)]
        assert set(draw.expired) == set(late)
        assert len(draw.expired) == len(late)
        self.check_batch(draw.batch, in_time)
        self.waiting = [e for e in in_time if e not in draw.batch]

    def check_batch(self, batch: list[Entry], in_time: list[Entry]) -> None:
        assert bool(batch) == bool(in_time), "a free worker takes what is there"
        if not batch:
            return
        # Python's sort is stable: within a priority it keeps the order of arrival.
        order = sorted(in_time, key=lambda e: -e.priority)
        assert batch[0] is order[0], "no kind overtakes the first in line"
        same_kind = [e for e in order if e.key == batch[0].key]
        assert batch == same_kind[: len(batch)], "in order, each once, none skipped"
        if len(batch) > 1:
            assert len(batch) <= LIMITS.requests
            assert sum(e.num_tokens for e in batch) <= LIMITS.tokens
            assert sum(e.job.memory.num_bytes for e in batch) <= LIMITS.num_bytes

    @invariant()
    def counts_what_waits(self) -> None:
        assert len(self.batcher) == len(self.waiting)


BatcherMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_nothing_is_lost_duplicated_or_starved = BatcherMachine.TestCase

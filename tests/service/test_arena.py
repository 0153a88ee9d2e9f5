import asyncio
import fcntl
import mmap
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.arena import ArenaFull, ArenaPool, Lease
from service.job import ALIGNMENT_BYTES

PAGE = mmap.PAGESIZE
SEGMENT = 2 * PAGE
CAPACITY = 4 * SEGMENT


@pytest.fixture
def pool() -> ArenaPool:
    return ArenaPool(CAPACITY, segment_bytes=SEGMENT)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * SEGMENT), st.integers(0, 50)), max_size=40))
def test_live_leases_never_overlap_and_every_byte_comes_back(operations: list[tuple[bool, int, int]]) -> None:
    pool = ArenaPool(CAPACITY, segment_bytes=SEGMENT)
    live: list[tuple[Lease, int]] = []
    for stamp, (allocating, num_bytes, which) in enumerate(operations, start=1):
        if allocating:
            try:
                lease = pool.allocate(num_bytes)
            except ArenaFull:
                assert pool.used_bytes > 0, "an empty pool refused a request below its capacity"
                continue
            assert lease.memory.num_bytes >= num_bytes
            assert lease.memory.offset % ALIGNMENT_BYTES == 0
            lease.view()[:] = bytes([stamp]) * lease.memory.num_bytes
            live.append((lease, stamp))
        elif live:
            lease, _ = live.pop(which % len(live))
            lease.release()
        assert pool.used_bytes == sum(lease.memory.num_bytes for lease, _ in live)
        assert pool.used_bytes <= pool.committed_bytes <= CAPACITY
        for lease, stamp in live:
            assert set(lease.view()) == {stamp}, "another lease wrote into this one"
    for lease, _ in live:
        lease.release()
    assert pool.used_bytes == 0
    assert pool.allocate(CAPACITY).memory.num_bytes == CAPACITY


def test_a_full_pool_refuses_until_a_lease_is_released(pool: ArenaPool) -> None:
    leases = [pool.allocate(SEGMENT) for _ in range(CAPACITY // SEGMENT)]
    with pytest.raises(ArenaFull):
        pool.allocate(1)
    leases[1].release()
    assert pool.allocate(SEGMENT).memory.segment == leases[1].memory.segment


def test_a_request_above_the_capacity_is_refused(pool: ArenaPool) -> None:
    with pytest.raises(ArenaFull):
        pool.allocate(CAPACITY + 1)
    assert pool.committed_bytes == 0


def test_releasing_twice_gives_the_bytes_back_once(pool: ArenaPool) -> None:
    first, second = pool.allocate(1), pool.allocate(1)
    first.release()
    first.release()
    assert pool.used_bytes == second.memory.num_bytes
    with pytest.raises(ValueError, match="released"):
        first.view()


def test_a_large_segment_is_kept_for_the_next_large_request(pool: ArenaPool) -> None:
    large = pool.allocate(SEGMENT + 1)
    large.release()
    small = pool.allocate(1)
    assert small.memory.segment != large.memory.segment
    assert pool.try_allocate(SEGMENT + PAGE).memory.segment == large.memory.segment


def test_where_whole_segments_do_not_fit_a_request_may_yet() -> None:
    pool = ArenaPool(5 << 19, segment_bytes=1 << 20)
    small = pool.allocate(256)
    large = pool.allocate(5 << 18)
    assert pool.committed_bytes == (1 << 20) + (5 << 18)
    with pytest.raises(ArenaFull):
        pool.allocate(5 << 18)
    large.release()
    pool.allocate(5 << 18).release()
    small.release()


def test_unused_segments_make_room_for_a_larger_one(pool: ArenaPool) -> None:
    first = pool.allocate(SEGMENT)
    pool.allocate(SEGMENT).release()
    large = pool.allocate(3 * SEGMENT)
    assert set(pool.segments()) == {first.memory.segment, large.memory.segment}
    assert pool.committed_bytes == CAPACITY


def test_a_dropped_segment_returns_its_memory_and_its_descriptors(pool: ArenaPool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool.allocate(CAPACITY).release()
    of_one_segment = len(os.listdir("/proc/self/fd")) - before
    for _ in range(10):
        pool.allocate(SEGMENT).release()
        pool.allocate(CAPACITY).release()
    assert len(os.listdir("/proc/self/fd")) == before + of_one_segment


def test_a_segment_can_neither_shrink_nor_grow(pool: ArenaPool) -> None:
    pool.allocate(1)
    (segment,) = pool.segments().values()
    for size in (PAGE, 2 * SEGMENT):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    assert fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_initial_memory_is_there_and_touched_before_the_first_request() -> None:
    pool = ArenaPool(CAPACITY, segment_bytes=SEGMENT, initial_bytes=2 * SEGMENT)
    assert pool.committed_bytes == 2 * SEGMENT
    for segment in pool.segments().values():
        assert os.fstat(segment.fd).st_blocks * 512 == SEGMENT
    assert pool.try_allocate(SEGMENT) is not None


def test_listeners_hear_of_every_change_of_the_segments(pool: ArenaPool) -> None:
    heard: list[tuple[int, set[int]]] = []
    pool.add_listener(lambda: heard.append((pool.generation, set(pool.segments()))))
    pool.allocate(1).release()
    pool.allocate(CAPACITY)
    assert [segments for _, segments in heard] == [{0}, set(), {1}]
    assert len({generation for generation, _ in heard}) == 3


def test_threads_share_the_pool_without_overlap() -> None:
    pool = ArenaPool(64 * SEGMENT, segment_bytes=SEGMENT)
    overlaps = []

    def churn(stamp: int) -> None:
        for size in range(1, 200):
            lease = pool.allocate(size * 37 % SEGMENT)
            pattern = bytes([stamp]) * lease.memory.num_bytes
            lease.view()[:] = pattern
            if lease.view() != pattern:
                overlaps.append(lease.memory)
            lease.release()

    threads = [threading.Thread(target=churn, args=(stamp,)) for stamp in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert pool.used_bytes == 0


def test_large_requests_share_what_a_larger_one_left_and_small_ones_find_room_there() -> None:
    pool = ArenaPool(CAPACITY, segment_bytes=SEGMENT)
    pool.allocate(CAPACITY).release()
    larger = [pool.allocate(SEGMENT + 1) for _ in range(CAPACITY // SEGMENT // 2)]
    assert {lease.memory.segment for lease in larger} == {0}
    small = pool.allocate(1)
    assert small.memory.segment == 0
    for lease in (*larger, small):
        lease.release()
    assert (pool.used_bytes, pool.allocate(CAPACITY).memory.num_bytes) == (0, CAPACITY)


def test_acquire_grows_off_the_event_loop() -> None:
    pool = ArenaPool(CAPACITY, segment_bytes=SEGMENT)
    growing_threads: list[int] = []
    pool.add_listener(lambda: growing_threads.append(threading.get_ident()))

    async def scenario() -> None:
        assert (await pool.acquire(1)).memory.segment == (await pool.acquire(1)).memory.segment
        with pytest.raises(ArenaFull):
            await pool.acquire(CAPACITY)

    asyncio.run(scenario())
    assert len(growing_threads) == 1
    assert growing_threads[0] != threading.get_ident()


def test_a_cancelled_acquire_leaks_nothing() -> None:
    pool = ArenaPool(CAPACITY, segment_bytes=SEGMENT)

    async def scenario() -> None:
        waiting = asyncio.ensure_future(pool.acquire(1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.get_running_loop().shutdown_default_executor()
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert pool.committed_bytes == SEGMENT
    assert pool.used_bytes == 0

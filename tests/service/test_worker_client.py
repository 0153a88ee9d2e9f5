"""The supervisor and real worker processes."""

import asyncio
import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fsa_core.problem import Problem
from fsa_core.tuning_table import Table
from service.arena import ArenaPool
from service.devices import CPU, DeviceSpec
from service.records import Memory
from service.worker_client import WorkerClient, WorkerFailed, WorkerLost
from tests.jobs import DENSE, SELECTED, Request


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool() -> ArenaPool:
    return ArenaPool(16 << 20, segment_bytes=1 << 20, initial_bytes=1 << 20)


@pytest.fixture(scope="module")
def spec(device: torch.device) -> DeviceSpec:
    return DeviceSpec("cuda", 0) if device.type == "cuda" else CPU


@pytest.fixture(scope="module")
def tuning_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tuned") / "table.json"
    file.write_text(Table("another-device", (), {}).to_json())
    return file


@pytest.fixture(scope="module")
def worker(
    runner: asyncio.Runner, pool: ArenaPool, spec: DeviceSpec, tuning_file: Path
) -> Iterator[WorkerClient]:
    """One process for every test that does it no harm: a start takes seconds."""

    client = runner.run(started(WorkerClient(spec, pool, num_threads=1, tuning_file=str(tuning_file))))
    yield client
    runner.run(client.stop(5))


def is_alive(pid: int) -> bool:
    """Whether a process exists, a zombie included."""
    return Path(f"/proc/{pid}").exists()


async def started(client: WorkerClient) -> WorkerClient:
    await client.start()
    await asyncio.wait_for(client.wait_ready(), 60)
    return client


def test_a_ready_worker_says_what_it_is(worker: WorkerClient, spec: DeviceSpec) -> None:
    assert worker.ready
    assert worker.device is not None
    assert (worker.device.kind, worker.device.index) == (spec.kind, spec.index)
    assert worker.device.torch_version == torch.__version__
    assert worker.device.name
    assert worker.device.memory_bytes > 1 << 28


def test_a_ready_worker_has_said_how_much_memory_is_in_use_before_any_batch(worker: WorkerClient) -> None:
    assert 0 < worker.memory_used_bytes <= worker.memory_total_bytes


def test_a_worker_goes_by_the_table_that_the_settings_name(worker: WorkerClient, tuning_file: Path) -> None:
    environment = Path(f"/proc/{worker.pid}/environ").read_text().split("\0")
    assert f"FSA_TUNING_FILE={tuning_file}" in environment


@pytest.mark.parametrize(
    "common",
    [SELECTED, replace(SELECTED, index_heads=1), replace(SELECTED, index_heads=6, causal=False), DENSE],
    ids=["selected", "shared_index", "index_of_each_head", "dense"],
)
def test_batched_answers_are_bitwise_those_of_each_request_alone(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool, device: torch.device, common: Problem
) -> None:
    requests = [Request.write(pool, common, seed) for seed in range(8)]

    async def scenario() -> None:
        result = await worker.submit([request.job for request in requests])
        assert result.kernel_seconds > 0
        assert min(result.h2d_seconds, result.d2h_seconds) >= 0

    runner.run(scenario())
    for request in requests:
        assert request.is_answered(str(device))
        request.lease.release()


def test_one_batch_computes_and_one_is_prefetched(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool
) -> None:
    request = Request.write(pool, SELECTED, 1)
    changes: list[int] = []
    worker.on_change = lambda: changes.append(worker.free_slots)

    async def scenario() -> None:
        assert worker.free_slots == 2
        first, second = worker.submit([request.job]), worker.submit([request.job])
        assert worker.free_slots == 0
        with pytest.raises(RuntimeError, match="outstanding"):
            worker.submit([request.job])
        await asyncio.gather(first, second)
        await asyncio.sleep(0)
        assert worker.free_slots == 2

    runner.run(scenario())
    assert len(changes) == 2
    assert changes[-1] == 2
    request.lease.release()


def test_incompatible_jobs_are_refused_and_take_no_slot(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool
) -> None:
    requests = [Request.write(pool, SELECTED, 1), Request.write(pool, DENSE, 1)]

    async def scenario() -> None:
        with pytest.raises(ValueError, match="compatible"):
            worker.submit([request.job for request in requests])
        assert worker.free_slots == 2

    runner.run(scenario())
    for request in requests:
        request.lease.release()


def test_signals_meant_for_the_server_leave_the_worker_to_finish(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool
) -> None:
    request = Request.write(pool, SELECTED, 2)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)

    async def scenario() -> None:
        await worker.submit([request.job])

    runner.run(scenario())
    request.lease.release()


def test_the_worker_maps_new_segments_and_unmaps_dropped_ones(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool, device: torch.device
) -> None:
    def mapped() -> int:
        return Path(f"/proc/{worker.pid}/maps").read_text().count("fsa-arena")

    async def run_one() -> None:
        request = Request.write(pool, SELECTED, 3)
        await worker.submit([request.job])
        assert request.is_answered(str(device))
        request.lease.release()

    async def scenario() -> None:
        filling = [pool.allocate(pool.segment_bytes) for _ in range(3)]
        await run_one()
        assert mapped() == len(pool.segments()) == 4
        for lease in filling:
            lease.release()
        pool.allocate(pool.capacity_bytes).release()
        assert len(pool.segments()) == 1
        await run_one()
        assert mapped() == len(pool.segments())

    runner.run(scenario())


def test_a_worker_runs_the_triton_kernels(pool: ArenaPool, spec: DeviceSpec, device: torch.device) -> None:
    """Natively on a GPU; without one the worker inherits TRITON_INTERPRET=1 from the suite."""
    requests = [Request.write(pool, SELECTED, seed, max_length=20) for seed in range(2)]

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1, backend="triton"))
        await client.submit([request.job for request in requests])
        await client.stop(5)

    asyncio.run(scenario())
    for request in requests:
        assert request.is_answered(str(device), "triton")
        request.lease.release()


def test_a_batch_that_raises_fails_alone(pool: ArenaPool, spec: DeviceSpec) -> None:
    bad, good = (Request.write(pool, SELECTED, seed) for seed in range(2))
    # More tokens than there are: the oracle, which believes what it is told, raises.
    bad.tensor("cu_seqlens_q")[-1] += 1000

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1, backend="reference"))
        pid = client.pid
        with pytest.raises(WorkerFailed) as failed:
            await client.submit([bad.job])
        assert failed.value.kind == "error"
        assert str(failed.value)
        await client.submit([good.job])
        assert client.pid == pid
        await client.stop(5)

    asyncio.run(scenario())
    assert not good.answer()[0].isnan().any()
    for request in (bad, good):
        request.lease.release()


def test_stop_lets_outstanding_batches_finish(
    pool: ArenaPool, spec: DeviceSpec, device: torch.device
) -> None:
    requests = [Request.write(pool, SELECTED, seed, max_length=400) for seed in range(2)]

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1))
        pid = client.pid
        assert pid is not None
        running = [client.submit([request.job]) for request in requests]
        await client.stop(30)
        assert all(future.done() for future in running)
        assert [future.exception() for future in running] == [None, None]
        assert not is_alive(pid)
        assert (client.ready, client.free_slots, client.pid) == (False, 0, None)
        with pytest.raises(WorkerLost):
            await client.submit([requests[0].job])
        assert not client.restarts

    asyncio.run(scenario())
    for request in requests:
        assert request.is_answered(str(device))
        request.lease.release()


def test_a_worker_runs_no_modules_of_the_folder_it_starts_in(
    pool: ArenaPool, spec: DeviceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's folder may well have a service.py, or a queue.py, which the standard library has as well."""
    for name in ("service", "queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1))
        assert client.restarts == {}
        await client.stop(5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_batch_of_many_may_take_as_long_as_each_of_them_alone(
    runner: asyncio.Runner, pool: ArenaPool, spec: DeviceSpec
) -> None:
    requests = [Request.write(pool, SELECTED, seed) for seed in range(4)]

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1, batch_timeout_seconds=0.5))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        running = client.submit([request.job for request in requests])
        await asyncio.sleep(1.0)
        os.kill(client.pid, signal.SIGCONT)
        await running
        assert client.restarts == {}
        await client.stop(5)

    runner.run(scenario())
    for request in requests:
        request.lease.release()


def test_a_segment_that_could_not_be_sent_is_sent_the_next_time(
    runner: asyncio.Runner, worker: WorkerClient, pool: ArenaPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", refuse)
            # A segment of its own.
            lease = pool.allocate(pool.segment_bytes + 1)
            await asyncio.sleep(0.05)
            with pytest.raises(OSError, match="Too many open files"):
                worker.submit([request.job])
        await worker.submit([request.job])
        lease.release()

    request = Request.write(pool, SELECTED, 1)
    runner.run(scenario())
    assert worker.restarts == {}
    request.lease.release()


def test_a_worker_that_ends_by_itself_is_not_taken_for_killed(
    pool: ArenaPool, spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        lost = asyncio.Event()
        client = await started(WorkerClient(spec, pool, num_threads=1))
        client.on_change = lambda: lost.set() if client.restarts else None
        process = client._process
        assert process is not None
        # What no front end sends ends it with a code of its own.
        process._channel.send(Memory(0, 0))
        await asyncio.wait_for(lost.wait(), 10)
        assert client.restarts == {"exit": 1}
        await client.stop(0)

    asyncio.run(scenario())


def test_a_stop_without_grace_does_not_wait_for_a_worker_that_hangs(
    pool: ArenaPool, spec: DeviceSpec
) -> None:
    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        lost = client.submit([request.job])
        asked_at = time.monotonic()
        await client.stop(0)
        assert time.monotonic() - asked_at < 1.5
        assert isinstance(lost.exception(), WorkerLost)

    request = Request.write(pool, SELECTED, 1)
    asyncio.run(scenario())
    request.lease.release()


def test_a_hung_worker_is_killed_and_its_batches_are_lost(pool: ArenaPool, spec: DeviceSpec) -> None:
    request = Request.write(pool, SELECTED, 1)

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1, batch_timeout_seconds=0.3))
        hung = client.pid
        assert hung is not None
        os.kill(hung, signal.SIGSTOP)
        sent_at = time.monotonic()
        lost = await asyncio.gather(*(client.submit([request.job]) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in lost] == [WorkerLost, WorkerLost]
        assert time.monotonic() - sent_at < 1.3
        await asyncio.sleep(0.05)
        assert client.restarts == {"hang": 1}
        assert not is_alive(hung)
        # Also while another one is starting.
        await client.stop(0)

    asyncio.run(scenario())
    request.lease.release()


def test_stop_kills_a_worker_that_does_not_finish_in_time(pool: ArenaPool, spec: DeviceSpec) -> None:
    request = Request.write(pool, SELECTED, 1)

    async def scenario() -> None:
        client = await started(WorkerClient(spec, pool, num_threads=1))
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        running = client.submit([request.job])
        await client.stop(0.1)
        assert isinstance(running.exception(), WorkerLost)
        assert not is_alive(pid)

    asyncio.run(scenario())
    request.lease.release()


def test_a_worker_that_does_not_start_in_time_is_tried_again_ever_more_slowly(
    pool: ArenaPool, spec: DeviceSpec
) -> None:
    ended_at: dict[int, float] = {}
    pids: set[int] = set()

    async def scenario() -> None:
        four_ends = asyncio.Event()

        def on_change() -> None:
            ended_at.setdefault(client.restarts["start_timeout"], time.monotonic())
            pids.add(client.pid or 0)
            if len(ended_at) == 5:
                four_ends.set()

        client = WorkerClient(spec, pool, start_timeout_seconds=0.02, on_change=on_change)
        await client.start()
        await four_ends.wait()
        assert not client.ready
        with pytest.raises(WorkerLost):
            await client.submit([])
        await client.stop(0)

    asyncio.run(scenario())
    pauses = [later - earlier for earlier, later in pairwise(ended_at[end] for end in (1, 2, 3, 4))]
    assert all(pause >= least for pause, least in zip(pauses, (0.2, 0.4, 0.8), strict=True))
    assert len(pids) == 4
    assert not any(is_alive(pid) for pid in pids)


def test_a_worker_that_exits_by_itself_is_counted_as_such(pool: ArenaPool, spec: DeviceSpec) -> None:
    async def scenario() -> None:
        lost = asyncio.Event()
        client = WorkerClient(spec, pool, log_format="no such format")
        client.on_change = lambda: lost.set() if client.restarts else None
        await client.start()
        await lost.wait()
        await client.stop(0)
        assert client.restarts == {"exit": 1}

    asyncio.run(scenario())

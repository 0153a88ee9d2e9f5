"""Workers killed under load, seen by their supervisor."""

import asyncio
import gc
import os
import random
import signal
import time
from pathlib import Path

from service.arena import ArenaPool
from service.devices import CPU
from service.job import JobResult
from service.worker_client import WorkerClient, WorkerLost
from tests.jobs import SELECTED, Request

KILLS = 20
NUM_WORKERS = 2


class Load:
    """Keeps a worker's slots full, with a request of its own in each batch, until told to stop."""

    def __init__(self, client: WorkerClient, requests: list[Request]) -> None:
        self.num_done = 0
        self.num_lost = 0
        self.slowest_loss_seconds = 0.0
        self.killed_at = 0.0
        self.stopping = False
        self._client = client
        self._requests = requests

    async def run(self) -> None:
        await asyncio.gather(*(self._keep_busy(request) for request in self._requests))

    async def _keep_busy(self, request: Request) -> None:
        while not self.stopping:
            if self._client.free_slots == 0:
                await asyncio.sleep(0.01)
                continue
            try:
                result = await self._client.submit([request.job])
            except WorkerLost:
                self.num_lost += 1
                self.slowest_loss_seconds = max(self.slowest_loss_seconds, time.monotonic() - self.killed_at)
            else:
                assert isinstance(result, JobResult)
                self.num_done += 1


async def kill_again_and_again(client: WorkerClient, load: Load, times: int, rng: random.Random) -> set[int]:
    """Each time once the worker is busy; returns the processes killed."""
    killed = set()
    gone = asyncio.Event()
    client.on_change = lambda: None if client.ready else gone.set()
    for _ in range(times):
        await asyncio.wait_for(client.wait_ready(), 60)
        await asyncio.sleep(rng.uniform(0.02, 0.1))
        assert client.free_slots == 0, "the load does not fill the worker"
        assert client.pid is not None
        killed.add(client.pid)
        load.killed_at = time.monotonic()
        gone.clear()
        os.kill(client.pid, signal.SIGKILL)
        await asyncio.wait_for(gone.wait(), 1)
    return killed


def test_twenty_kills_under_load_lose_no_future_no_descriptor_and_no_process() -> None:
    pool = ArenaPool(16 << 20, segment_bytes=4 << 20, initial_bytes=16 << 20)
    requests = [Request.write(pool, SELECTED, seed, max_length=2000) for seed in range(2 * NUM_WORKERS)]

    async def scenario() -> set[int]:
        clients = [WorkerClient(CPU, pool, num_threads=1, healthy_seconds=0) for _ in range(NUM_WORKERS)]
        loads = [Load(client, requests[2 * i : 2 * i + 2]) for i, client in enumerate(clients)]
        for client in clients:
            await client.start()
        await asyncio.gather(*(client.wait_ready() for client in clients))
        # What earlier tests left to the collector must not be closed between the two counts.
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd"))
        running = [asyncio.ensure_future(load.run()) for load in loads]
        killed = await asyncio.gather(
            *(
                kill_again_and_again(client, load, KILLS // NUM_WORKERS, random.Random(i))
                for i, (client, load) in enumerate(zip(clients, loads, strict=True))
            )
        )
        await asyncio.gather(*(client.wait_ready() for client in clients))
        assert len(os.listdir("/proc/self/fd")) == descriptors
        for load in loads:
            load.stopping = True
        await asyncio.wait_for(asyncio.gather(*running), 30)

        for client, load in zip(clients, loads, strict=True):
            assert client.restarts == {"killed": KILLS // NUM_WORKERS}
            assert load.num_lost == 2 * KILLS // NUM_WORKERS
            assert load.slowest_loss_seconds < 1
            assert load.num_done > 0
            await client.stop(5)
        return set().union(*killed)

    pids = asyncio.run(scenario())
    assert len(pids) == KILLS
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert all(request.is_answered() for request in requests)

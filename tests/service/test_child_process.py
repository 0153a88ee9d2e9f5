import asyncio
import signal
import sys

import pytest

from service.child_process import ChildProcess


async def exit_status(code: str, *, kill: bool = False) -> int:
    child = ChildProcess([sys.executable, "-S", "-c", code], pass_fds=[], env={})
    if kill:
        child.kill()
    return await asyncio.wait_for(child.exited, 10)


def test_the_exit_status_is_that_of_the_process() -> None:
    assert asyncio.run(exit_status("raise SystemExit(3)")) == 3
    assert asyncio.run(exit_status("import time; time.sleep(60)", kill=True)) == -signal.SIGKILL


def test_killing_what_has_just_ended_does_not_lose_its_status() -> None:
    async def scenario() -> None:
        child = ChildProcess(["/bin/sh", "-c", "exit 3"], pass_fds=[], env={})
        while not child.exited.done():
            child.kill()
            await asyncio.sleep(0.0001)
        assert child.exited.result() in (3, -signal.SIGKILL)
        child.kill()

    for _ in range(20):
        asyncio.run(scenario())


def test_what_cannot_be_started_raises() -> None:
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError):
            ChildProcess(["/no/such/program"], pass_fds=[], env={})

    asyncio.run(scenario())

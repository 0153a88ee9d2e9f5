"""Waiting for work that must not be abandoned half way."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def settled(future: "asyncio.Future[T]", on_cancel: Callable[[], object] | None = None) -> T:
    """The future's result. A cancellation of the caller is raised only once the future is done.

    For work that uses memory of the caller's (a thread that copies, a batch in a worker): whatever
    the caller releases afterwards, nobody writes there any more. ``on_cancel`` is called when a
    cancellation comes, and may settle the future early.
    """
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancellation = error
            if on_cancel is not None:
                on_cancel()
    if cancellation is None:
        return future.result()
    if not future.cancelled():
        # Marks a failure as seen; the one who wanted it is gone.
        future.exception()
    raise cancellation

"""The server's process: its environment, its signals, its ready line, its exit code."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from service.config import Settings, unknown_variables
from service.malloc import restart_tuned
from service.signals import leave_at_once
from service.telemetry import configure_logging

log = logging.getLogger("fsa.server")

# For refusals that are written but not yet sent.
FLUSH_SECONDS = 1.0


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code of the process.

    Restarts the process once, with glibc's allocator tuned. Prints one line of JSON to standard output
    when the ports are open: ``{"event": "listening", "host", "port", "metrics_port", "pid"}``. The first
    signal drains: 0 when every request in flight was answered within the grace, else 1. A second one
    does not wait. Before there is anything to drain a signal gives 128 + its number. A port or a device
    that is not to be had, or a bad table, gives 1 at once.
    """
    # Until the event loop has them: nothing is open yet.
    leave_at_once(signal.SIGTERM, signal.SIGINT)
    restart_tuned()
    configure_logging(settings.log_level, settings.log_format)
    if unknown := unknown_variables(os.environ):
        log.warning("no setting is named by %s", ", ".join(unknown))
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    # Torch comes in with these: not before the process has its final environment.
    from fsa_core.tuning_table import TuningError
    from service.app import App, CannotListen
    from service.devices import NoSuchDevice

    signals = _Signals()
    try:
        app = App(settings)
        ports = await app.start()
    except (CannotListen, NoSuchDevice, TuningError) as error:
        print(f"fsa: cannot start: {error}", file=sys.stderr)
        return 1
    ready = {
        "event": "listening",
        "host": settings.host,
        "port": ports.grpc,
        "metrics_port": ports.metrics,
        "pid": os.getpid(),
    }
    print(json.dumps(ready), flush=True)
    await signals.first.wait()
    log.info("draining", extra={"grace_seconds": settings.drain_grace_seconds})
    is_drained = await _drain(app.drain(), signals.second, settings.drain_grace_seconds)
    await app.stop(grace_seconds=FLUSH_SECONDS if is_drained else 0.0)
    log.info("stopped", extra={"drained": is_drained})
    return 0 if is_drained else 1


class _Signals:
    """SIGTERM and SIGINT as events of the running loop: the first one, and any after it."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _drain(draining: Coroutine[Any, Any, None], hurry: asyncio.Event, grace_seconds: float) -> bool:
    """Whether everything in flight was answered before the grace was over or a signal said to hurry."""
    drained = asyncio.create_task(draining)
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({drained, hurried}, timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED)
    is_drained = drained.done()
    drained.cancel()
    hurried.cancel()
    return is_drained

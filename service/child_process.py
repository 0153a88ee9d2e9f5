"""A child process whose end is a future of the event loop."""

import asyncio
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from service.signals import blocked_in_children

_STDERR = 2


class ChildProcess:
    """Started at once; reaped by a thread of its own as soon as it ends.

    asyncio's own subprocesses lose the exit status when a signal is sent to a child that has just ended: two
    parties reap it (CPython 3.11, ThreadedChildWatcher and Popen.send_signal). subprocess.Popen has a lock.
    """

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str]) -> None:
        """
        Raises:
            OSError: it could not be started.
        """
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        """The exit status; negative: the signal that ended it."""
        with blocked_in_children(signal.SIGINT, signal.SIGTERM):
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                # Standard output belongs to the command that runs the server.
                stdout=_STDERR,
                pass_fds=pass_fds,
                env=env,
            )
        self.pid = self._popen.pid
        threading.Thread(target=self._reap, name=f"reap-{self.pid}", daemon=True).start()

    def kill(self) -> None:
        """Nothing where it has ended."""
        self._popen.kill()

    def _reap(self) -> None:
        status = self._popen.wait()
        with suppress(RuntimeError):  # The loop is closed: nobody waits.
            self._loop.call_soon_threadsafe(self._set_exited, status)

    def _set_exited(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)

"""Signals that end a process for sure, and that its children do not hear.

Python's own answer to Ctrl-C is an exception wherever the main thread is. Where none can be raised, in a
finalizer or in the callback of a weak reference, of which every import has some, it is printed and forgotten.
Where it passes through the exec() of a text, as when a dataclass is made, ``python -m`` ends by the signal
and not with the exit code, even if it was caught.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1
_SHOW_CURSOR = b"\x1b[?25h\n"


def leave_at_once(*numbers: signal.Signals) -> None:
    """From now on each of these ends the process with 128 + its number: 130 for Ctrl-C.

    For a process that has nothing to put right: no ``finally`` runs. Main thread only.
    """
    for number in numbers:
        signal.signal(number, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    try:
        # A progress bar hides it.
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), _SHOW_CURSOR)
        sys.stdout.flush()
    finally:
        os._exit(128 + number)


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def blocked_in_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that this thread starts meanwhile never get these signals, from their first moment on.

    A terminal sends Ctrl-C, and a service manager SIGTERM, to all of them; it is for this process to end
    them. Not SIG_IGN, which would lose what is meant for this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

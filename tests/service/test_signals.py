"""Signals that end a process wherever it is."""

import signal
import subprocess
import sys

import pytest

from service.signals import blocked_in_children

SETUP = """
import signal, sys, weakref
from service.signals import leave_at_once
leave_at_once(signal.SIGINT, signal.SIGTERM)
print("said before")
class Thing: pass
thing = Thing()
"""
# Each delivers the signal where an exception would be lost, and would end with 1 after it.
PLACES = {
    "the callback of a weak reference": (
        "reference = weakref.ref(thing, lambda _: signal.raise_signal(NUMBER))\ndel thing\n"
    ),
    "a finalizer": "Thing.__del__ = lambda _: signal.raise_signal(NUMBER)\ndel thing\n",
    "what catches everything": "try: signal.raise_signal(NUMBER)\nexcept BaseException: pass\n",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_the_process_where_an_exception_would_be_lost(
    place: str, number: signal.Signals
) -> None:
    code = SETUP + PLACES[place].replace("NUMBER", str(int(number))) + "sys.exit(1)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "said before\n", "")


def test_a_child_does_not_hear_what_is_blocked_in_it_and_its_parent_does() -> None:
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with blocked_in_children(signal.SIGINT):
            child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            # To this thread: another, of torch's say, would hear at once what is sent to the process.
            signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, handler)
    with child:
        child.send_signal(signal.SIGINT)
        child.terminate()
        assert child.wait(10) == -signal.SIGTERM

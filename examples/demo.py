"""The demonstration behind ``make demo``: starts a server, runs transformers_remote.py against it, stops it.

The server takes every GPU there is, else the CPU.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import options

# The first start on a GPU compiles the kernels.
START_SECONDS = 300.0
STOP_SECONDS = 40.0
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class ServerFailed(Exception):
    """The server ended before its ports were open, or was not healthy in time."""


def start_server(log: Path) -> subprocess.Popen[bytes]:
    """A server on free ports, whose ready line is yet to be read; its log goes to ``log``."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--metrics-port", "0"]
    with log.open("wb") as errors:
        # A session of its own: Ctrl-C reaches only this process, which then stops the server in order.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )


def stop_server(server: subprocess.Popen[bytes], in_a_hurry: Callable[[], bool]) -> None:
    """SIGTERM, which drains; SIGKILL to the whole session when that takes too long or there is a hurry."""
    server.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while server.poll() is None and time.monotonic() < deadline and not in_a_hurry():
        time.sleep(0.05)
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def run(server: subprocess.Popen[bytes], log: Path) -> int:
    """The model against the server; the exit code."""
    # Not before signals are handled; torch, which comes with it, takes seconds, in the server as well.
    import transformers_remote
    from transformers_remote import console, step

    try:
        with step("Starting the server"):
            ready = _wait_healthy(server)
    except ServerFailed as error:
        console.print(f"[bold red]{error}[/]; the end of its log:")
        console.print("\n".join(log.read_text().splitlines()[-20:]), markup=False)
        return 1
    target = f"127.0.0.1:{ready['port']}"
    metrics = f"http://127.0.0.1:{ready['metrics_port']}/metrics"
    return transformers_remote.main(["--target", target, "--metrics-url", metrics, *sys.argv[1:]])


def _wait_healthy(server: subprocess.Popen[bytes]) -> dict[str, int]:
    from transformers_remote import console

    from service.client import AttentionClient, Unavailable

    line = server.stdout.readline()
    if not line:
        raise ServerFailed("the server did not start")
    ready = json.loads(line)
    deadline = time.monotonic() + START_SECONDS
    with AttentionClient(f"127.0.0.1:{ready['port']}") as client:
        while True:
            try:
                client.wait_ready(timeout_seconds=1)
                break
            except Unavailable as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ServerFailed("the server did not become healthy") from error
        devices = ", ".join(f"{device.name} ({device.kind})" for device in client.server_info().devices)
    console.print(f"Server {ready['pid']} on port {ready['port']} computes on {devices}")
    return ready


def main() -> int:
    # What is wrong with them is said before anything starts; transformers_remote.py takes the same.
    options.parser("Start a server, let a language model compute its attention there, stop it.").parse_args()
    # Noted, not raised: an exception comes wherever the main thread is, and is lost where none can be raised,
    # as in a callback of the import system. This thread does nothing but wait.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    with tempfile.TemporaryDirectory(prefix="fsa-demo-") as folder:
        log = Path(folder) / "server.log"
        server = start_server(log)
        running = ThreadPoolExecutor(1).submit(run, server, log)
        while not (running.done() or signals):
            wait([running], timeout=0.1)
        num_signals = len(signals)
        print("Interrupted; stopping the server" if signals else "Stopping the server", flush=True)
        stop_server(server, in_a_hurry=lambda: len(signals) > num_signals)
    if signals:
        if sys.stdout.isatty():
            print(SHOW_CURSOR, flush=True)
        # The thread may be anywhere, and cannot be told to end.
        os._exit(128 + signals[0])
    return running.result()


if __name__ == "__main__":
    sys.exit(main())

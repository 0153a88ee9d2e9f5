"""The demonstration behind ``make demo``: starts a server, runs transformers_remote.py against it, stops it.

The server takes every GPU there is, else the CPU. Arguments are those of transformers_remote.py.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import transformers_remote
from transformers_remote import console, step

from service.client import AttentionClient, Unavailable

# The first start on a GPU compiles the kernels.
START_SECONDS = 300.0
STOP_SECONDS = 40.0


class ServerFailed(Exception):
    """The server ended before its ports were open, or was not healthy in time."""


@contextmanager
def running_server(log: Path) -> Iterator[dict[str, int]]:
    """A healthy server on free ports: yields its ready line; whatever happens, no process is left.

    Its log goes to ``log``. Raises ServerFailed.
    """
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--metrics-port", "0"]
    with log.open("wb") as errors:
        # A session of its own: Ctrl-C reaches only this process, which then stops the server in order.
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    try:
        with step("Starting the server"):
            ready = _wait_healthy(server)
        yield ready
    finally:
        with step("Stopping the server"):
            _stop(server)


def _wait_healthy(server: subprocess.Popen[bytes]) -> dict[str, int]:
    line = server.stdout.readline()
    if not line:
        raise ServerFailed("the server did not start")
    ready = json.loads(line)
    deadline = time.monotonic() + START_SECONDS
    with AttentionClient(f"127.0.0.1:{ready['port']}") as client:
        while not _is_healthy(client):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed("the server did not become healthy")
        devices = ", ".join(f"{device.name} ({device.kind})" for device in client.server_info().devices)
    console.print(f"Server {ready['pid']} on port {ready['port']} computes on {devices}")
    return ready


def _is_healthy(client: AttentionClient) -> bool:
    try:
        client.wait_ready(timeout_seconds=1)
    except Unavailable:
        return False
    return True


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which drains; SIGKILL to the whole session when that takes too long or is interrupted."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    with tempfile.TemporaryDirectory(prefix="fsa-demo-") as folder:
        log = Path(folder) / "server.log"
        try:
            with running_server(log) as ready:
                target = f"127.0.0.1:{ready['port']}"
                metrics = f"http://127.0.0.1:{ready['metrics_port']}/metrics"
                return transformers_remote.main(["--target", target, "--metrics-url", metrics, *sys.argv[1:]])
        except ServerFailed as error:
            console.print(f"[bold red]{error}[/]; the end of its log:")
            console.print("\n".join(log.read_text().splitlines()[-20:]), markup=False)
            return 1
        except KeyboardInterrupt:
            console.print("Interrupted.")
            return 130


if __name__ == "__main__":
    sys.exit(main())

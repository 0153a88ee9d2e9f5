"""Runs the server of a built image and checks what it promises.

    python tests/deploy/check_image.py localhost/fsa-serve

Needs root and buildah, whose chroot isolation works where no Docker engine does, and the image in
buildah's storage. Part of no test run: building the image takes minutes. The container shares the
host's network here, so the server gets free ports through its environment.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fsa_core.api import selected_attention
from service.client import AttentionClient, InvalidRequest

os.environ.setdefault("STORAGE_DRIVER", "vfs")
os.environ["BUILDAH_ISOLATION"] = "chroot"
START_SECONDS = 120.0
SECRETS = ("password", "secret", "token", "credential", "api_key")


def main(image: str) -> None:
    config = image_config(image)
    check_static(config)
    with container(image) as name:
        check_compiler(name)
        check_server(name, [*config["Entrypoint"], *config["Cmd"]], healthcheck(config))


def check_compiler(name: str) -> None:
    """What Triton does for each kernel: compile C against Python's headers, into its cache."""
    stub = "#include <Python.h>"
    program = (
        "import subprocess, sysconfig; subprocess.run(['gcc', '-I', sysconfig.get_path('include'), '-xc', "
        f"'-shared', '-fPIC', '-', '-o', '/var/cache/fsa/stub.so'], input='{stub}', text=True, check=True)"
    )
    buildah("run", name, "--", "python", "-c", program)
    require(True, "a C stub compiles into Triton's cache")


def check_server(name: str, command: list[str], probe: list[str]) -> None:
    port, metrics_port = free_port(), free_port()
    run = ["buildah", "run", f"--env=FSA_PORT={port}", f"--env=FSA_METRICS_PORT={metrics_port}", name, "--"]
    with subprocess.Popen([*run, *command], stdout=subprocess.PIPE) as running:
        try:
            server = json.loads(running.stdout.readline())["pid"]  # chroot isolation: the host's process ids
            check_answers(f"127.0.0.1:{port}")
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as response:
                require("fsa_build_info" in response.read().decode(), "/metrics is served")
            uid = Path(f"/proc/{server}").stat().st_uid
            require(uid != 0, f"the server runs as user {uid}, not root")
            require(subprocess.call([*run, *probe]) == 0, "HEALTHCHECK passes while it serves")
            os.kill(server, signal.SIGTERM)
            require(running.wait(60) == 0, "SIGTERM ends the server with exit code 0")
            unhealthy = subprocess.call([*run, *probe], stderr=subprocess.DEVNULL)
            require(unhealthy == 1, "HEALTHCHECK fails with 1 when nothing serves")
        finally:
            if running.poll() is None:
                running.terminate()


def image_config(image: str) -> dict[str, Any]:
    """The image's configuration, as Docker's format has it."""
    return json.loads(buildah("inspect", "--type=image", image))["Docker"]["config"]


def check_static(config: dict[str, Any]) -> None:
    user = config["User"].split(":")[0]
    require(user.isdigit() and user != "0", f"user is {config['User']}: numeric and not root")
    require(config["Entrypoint"][0] != "/bin/sh", "the entry point is no shell, so signals reach the server")
    require(
        {"50051/tcp", "9464/tcp"} == set(config["ExposedPorts"]), "the gRPC and the metrics port are exposed"
    )
    require("/var/cache/fsa" in config["Volumes"], "Triton's cache is a volume")
    variables = [variable.split("=")[0].lower() for variable in config["Env"]]
    require(not any(secret in name for name in variables for secret in SECRETS), "no variable names a secret")


def healthcheck(config: dict[str, Any]) -> list[str]:
    in_format = "HEALTHCHECK is in the image, so that it was built in Docker's format (BUILDAH_FORMAT=docker)"
    require("Healthcheck" in config, in_format)
    kind, *command = config["Healthcheck"]["Test"]
    require(kind == "CMD", "HEALTHCHECK needs no shell")
    return command


def check_answers(target: str) -> None:
    """A request with a short last block and pads, against the float64 oracle; then a wrong one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 6, 40), torch.randn(70, 3, 40), torch.randn(70, 3, 40)
    blocks, own = torch.arange(5, dtype=torch.int32), torch.arange(70)[:, None] // 16
    indices = torch.where((blocks <= own) & (blocks != 2), blocks, -1).expand(3, -1, -1).contiguous()
    with AttentionClient(target) as client:
        client.wait_ready(START_SECONDS)
        print("ok: healthy")
        answer = client.selected_attention(q, k, v, indices, block_size=16)
        expected, _ = selected_attention(q, k, v, indices, block_size=16, backend="reference")
        error = (answer.out - expected).abs().max().item()
        require(error < 1e-5, f"the answer is {error:.1e} from fsa_core.reference")
        try:
            client.selected_attention(q, k, v, indices + 5, block_size=16)
        except InvalidRequest as refused:
            require(bool(refused.reason), f"a wrong request is refused with {refused.reason}")
        else:
            require(False, "a wrong request is refused")


@contextlib.contextmanager
def container(image: str) -> Iterator[str]:
    name = buildah("from", "--pull-never", image).strip()
    try:
        yield name
    finally:
        buildah("rm", name)


def buildah(*arguments: str) -> str:
    return subprocess.run(["buildah", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


if __name__ == "__main__":
    started = time.monotonic()
    main(sys.argv[1])
    print(f"image checked in {time.monotonic() - started:.0f} s")

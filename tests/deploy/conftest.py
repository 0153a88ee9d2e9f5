"""A real server with some traffic behind it, and a real Prometheus that scrapes it."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from service.client import AttentionClient, BlockIndices, InvalidRequest
from tests.serving import ServerProcess, running_server

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of its HTTP API."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        ) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[Any]:
        """The vector that ``expression`` gives now. Raises HTTPError when it is no PromQL."""
        return self.get("query", query=expression)["result"]


@pytest.fixture(scope="session")
def server(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that has answered a good request and refused a bad one."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type) as running:
        running.wait_for_health()
        with AttentionClient(f"127.0.0.1:{running.port}") as client:
            x = np.ones((16, 1, 16), np.float16)
            client.attend(x, x, x, BlockIndices(np.zeros((1, 16, 1), np.int32), 16))
            with pytest.raises(InvalidRequest):
                client.attend(x, x, x, BlockIndices(np.full((1, 16, 1), 7, np.int32), 16))
        yield running


@pytest.fixture(scope="session")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the deployed configuration, but for the server's address and shorter intervals."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.metrics_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Prometheus(f"http://{address}")
        _wait_for_scrapes(running, 3)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_scrapes(prometheus: Prometheus, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            found = prometheus.query('count_over_time(up{job="fsa"}[1m])')
        except (urllib.error.URLError, ConnectionError):
            found = []
        if found and float(found[0]["value"][1]) >= count:
            return
        time.sleep(0.2)
    pytest.fail(f"Prometheus did not scrape the server {count} times in 30 s")

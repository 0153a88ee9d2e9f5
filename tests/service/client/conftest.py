"""One server for the tests of both clients."""

from collections.abc import Iterator

import pytest
import torch

from tests.serving import ServerProcess, running_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type) as server:
        server.wait_for_health()
        yield server

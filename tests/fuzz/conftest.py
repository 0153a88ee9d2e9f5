"""One running server for all tests of a module."""

from collections.abc import Iterator

import pytest
import torch

from tests.fuzz.bad_requests import LIMITS
from tests.serving import ServerProcess, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type, **LIMITS) as server:
        server.wait_for_health()
        yield server

"""One running server for all tests of a module."""

from collections.abc import Iterator

import pytest
import torch

from tests.fsa_core.conftest import assert_close_to_oracle_fixture, make_case
from tests.serving import ServerProcess, running_server

__all__ = ["assert_close_to_oracle_fixture", "make_case"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type) as server:
        server.wait_for_health()
        yield server

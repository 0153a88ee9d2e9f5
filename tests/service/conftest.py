"""One running server for all tests of a module, and the ``fsa`` command."""

import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from service.cli import main
from tests.fsa_core.conftest import assert_close_to_oracle_fixture, make_case
from tests.serving import ServerProcess, running_server

__all__ = ["assert_close_to_oracle_fixture", "make_case"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Fsa = Callable[..., Outcome]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type) as server:
        server.wait_for_health()
        yield server


@pytest.fixture
def fsa(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Fsa]:
    """Runs ``fsa`` with the given words in this process."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fsa", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        return Outcome(code if isinstance(code, int) else 1, *capfd.readouterr())

    handler = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, handler)

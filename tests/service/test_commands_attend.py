"""``fsa attend`` writes to what OUTPUT is, as every other program does."""

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from tests.service.conftest import Fsa
from tests.serving import ServerProcess


@pytest.fixture
def source(tmp_path: Path) -> Path:
    x = np.ones((16, 1, 16), np.float16)
    save_file({"q": x, "k": x, "v": x}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def test_an_answer_has_the_mode_of_other_new_files(
    fsa: Fsa, server: ServerProcess, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.touch()
    outcome = fsa("attend", source, tmp_path / "out", "--dense", "--target", server.target)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out").stat().st_mode == other.stat().st_mode


def test_an_answer_goes_to_the_end_of_a_link(
    fsa: Fsa, server: ServerProcess, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("file")
    outcome = fsa("attend", source, tmp_path / "link", "--dense", "--target", server.target)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "file").keys() == {"out", "lse"}


def test_an_answer_goes_through_a_fifo(fsa: Fsa, server: ServerProcess, source: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    outcome = fsa("attend", source, fifo, "--dense", "--target", server.target)
    assert outcome.code == 0, outcome.err
    reader.join(10)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert load(read[0]).keys() == {"out", "lse"}

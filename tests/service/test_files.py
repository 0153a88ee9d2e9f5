"""What is written is whole, and goes where its name points."""

import os
import stat
import threading
from pathlib import Path

import pytest

from service.files import check_writable, write_file


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "new", b"content")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new") == 0o640
    (tmp_path / "new").chmod(0o604)
    write_file(tmp_path / "new", b"other")
    assert mode_of(tmp_path / "new") == 0o604
    assert (tmp_path / "new").read_bytes() == b"other"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link, file = tmp_path / "link", folder / "file"
    link.symlink_to("elsewhere/file")
    if is_there:
        file.write_bytes(b"before")
    check_writable(link)
    write_file(link, b"content")
    assert link.is_symlink()
    assert file.read_bytes() == b"content"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_fifo_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_writable(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    write_file(fifo, b"content")
    reader.join(10)
    assert read == [b"content"]
    assert fifo.is_fifo()


def test_what_could_not_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    name = "n" * 256
    with pytest.raises(OSError, match="too long"):
        write_file(tmp_path / name, b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_a_file_in_no_folder_are_refused_before_there_is_anything(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("absent/file")
    for name in ("", "absent/file", "loop", "dangling"):
        with pytest.raises(OSError, match=r"Is a directory|No such file|Too many levels"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "file")
    assert not (tmp_path / "file").exists()

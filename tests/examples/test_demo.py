"""``make demo`` on a few tokens: the real model, the real server, the process that owns it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import smollm2
import torch
import transformers_remote

from service.client import AttentionClient
from tests.serving import eventually, running_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_text((ROOT / "LICENSE").read_text()[:1200])
    return path


def start_demo(context: Path) -> subprocess.Popen[str]:
    few = ["--max-new-tokens=3", "--block-size=16", "--blocks=4", f"--context={context}"]
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *few]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def test_demo_agrees_and_reports(context: Path) -> None:
    demo = start_demo(context)
    output, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, output
    assert "Full selection and local attention agree" in output
    assert re.search(r"Each new token attended 4 of the \d\d blocks of 16 tokens", output)
    for stage in ("decode", "queue", "h2d", "kernel", "d2h", "encode"):
        assert re.search(rf"│ {stage} +│ +[1-9]", output), f"no requests in stage {stage}:\n{output}"


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--blocks=0", "argument --blocks: '0': expected a whole number from 1 on"),
        ("--max-new-tokens=few", "argument --max-new-tokens: 'few': expected a whole number from 1 on"),
        ("--block-size=48", "argument --block-size: invalid choice: 48"),
        ("--context=nowhere.txt", "argument --context: 'nowhere.txt': expected a text file (No such file"),
        ("--slots=4", "unrecognized arguments: --slots=4"),
    ],
)
def test_wrong_arguments_are_named_before_anything_starts(argument: str, complaint: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), argument]
    demo = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert demo.returncode == 2
    assert complaint in demo.stderr
    assert demo.stdout == ""


def test_interrupted_demo_leaves_no_process(context: Path) -> None:
    demo = start_demo(context)
    started = next((line for line in demo.stdout if re.match(r"Server \d+ on port", line)), "")
    server = int(started.split()[1])
    assert server in processes_of_session(server)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert processes_of_session(server) == []


def test_demo_that_is_interrupted_while_it_loads_leaves_no_process(context: Path) -> None:
    demo = start_demo(context)
    children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")
    server = int(eventually(children.read_text))
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in output
    assert processes_of_session(server) == []


@pytest.fixture
def client(device: torch.device, tmp_path: Path) -> Iterator[AttentionClient]:
    with running_server(tmp_path / "log", devices=device.type) as server:
        server.wait_for_health()
        with AttentionClient(f"127.0.0.1:{server.port}") as made:
            yield made


def test_a_selection_that_leaves_blocks_out_is_told_from_rounding(
    client: AttentionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = transformers_remote.Chat(*smollm2.load(), max_new_tokens=2)
    assert transformers_remote.compare_full(chat, client, "Why is the sky blue?", 16)
    monkeypatch.setattr(transformers_remote, "all_blocks", transformers_remote.best_blocks(1))
    assert not transformers_remote.compare_full(chat, client, "Why is the sky blue?", 16)

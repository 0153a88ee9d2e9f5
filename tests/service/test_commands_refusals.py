"""What a command cannot take, or cannot write, is one line and an exit code, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.conftest import Fsa
from tests.serving import ServerProcess

SHAPE = "q_heads=8,kv_heads=2,head_dim=128,block_size=64,slots=16"
LARGEST = 1 << 30


@pytest.mark.parametrize("command", ["info", "bench", "attend in out"])
def test_a_target_that_is_empty_is_wrong_usage(fsa: Fsa, command: str) -> None:
    outcome = fsa(*command.split(), "--target", "")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "fsa: --target is empty; it must be host:port, such as 127.0.0.1:50051\n"


@pytest.mark.parametrize("command", ["bench", "attend in out"])
@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_deadline_that_is_no_time_is_wrong_usage(fsa: Fsa, command: str, seconds: str) -> None:
    outcome = fsa(*command.split(), f"--timeout-seconds={seconds}")
    assert (outcome.code, outcome.out) == (2, "")
    expected = f"fsa: --timeout-seconds is {float(seconds)}; it must be seconds from 0 on, or inf\n"
    assert outcome.err == expected


@pytest.mark.parametrize("seconds", ["0", "nan", "inf"])
def test_a_run_of_no_or_endless_length_is_wrong_usage(fsa: Fsa, seconds: str) -> None:
    outcome = fsa("bench", f"--duration={seconds}")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"fsa: --duration is {float(seconds)}; it must be seconds from 0.1 on\n"


@pytest.mark.parametrize("tokens", [str(LARGEST + 1), "1" + "0" * 17, "9" * 20, "9" * 5000])
@pytest.mark.parametrize("words", [["info", "--shape", SHAPE, "--device", "X"], ["tune"]])
def test_more_tokens_than_there_can_be_are_wrong_usage(fsa: Fsa, words: list[str], tokens: str) -> None:
    outcome = fsa(*words, "--tokens", tokens)
    assert (outcome.code, outcome.out) == (2, "")
    expected = (
        f"fsa: --tokens is '{tokens}'; it must be positive integers up to {LARGEST}, such as 8192,65536\n"
    )
    assert outcome.err == expected


def test_the_largest_number_of_tokens_has_a_path(fsa: Fsa) -> None:
    assert fsa("info", "--shape", SHAPE, "--device", "X", "--tokens", LARGEST).code == 0


def test_a_shape_that_no_tensor_can_have_is_wrong_usage(fsa: Fsa) -> None:
    shape = f"q_heads={LARGEST},kv_heads={LARGEST},head_dim={LARGEST},block_size=64,slots=16"
    outcome = fsa("info", "--shape", shape, "--device", "X", "--tokens", LARGEST)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"fsa: --shape: no tensor of {LARGEST} tokens can be that large\n"


def test_a_request_larger_than_the_server_takes_is_not_made(fsa: Fsa, server: ServerProcess) -> None:
    for tokens, size in ((20_000_000, "119.2 GiB"), (10**30, "5.821e+21 TiB")):
        outcome = fsa("bench", "--target", server.target, "--tokens", tokens)
        assert (outcome.code, outcome.out) == (1, "")
        expected = (
            f"fsa: a request has {size}; the server at {server.target} takes 512 MiB at most "
            "(max_message_bytes)\n"
        )
        assert outcome.err == expected


def test_a_request_that_this_machine_has_no_memory_for_is_one_line(server: ServerProcess) -> None:
    words = f"bench --target {server.target} --tokens 80000"
    command = ["sh", "-c", f'ulimit -v 1200000; exec "$0" -m service.cli {words}', sys.executable]
    # With many cores gRPC has no room for its threads either, and would say so of each.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fsa: this machine has not the memory to make a request of 488.3 MiB\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [["info", "--shape", SHAPE, "--device", "X"], ["config", "--json"], ["--help"]]
)
def test_output_that_cannot_be_written_is_one_line(words: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "service.cli", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "fsa: the output cannot be written: No space left on device\n"


def test_output_that_is_closed_is_no_failure() -> None:
    command = ["sh", "-c", '"$0" -m service.cli config >&-', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

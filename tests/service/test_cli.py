"""The ``fsa`` command as its user meets it: what it prints, where, and its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors import torch as torch_safetensors
from safetensors.numpy import load_file, save_file

from fsa_core import dispatch, tuning_table
from fsa_core.plan import PATHS, plan_forward
from service.client import AttentionClient, BlockIndices
from service.commands.shapes import CallShape
from service.config import Settings
from tests.service.conftest import Fsa, Outcome
from tests.serving import ServerProcess, eventually, running_server

NOBODY = "127.0.0.1:1"
MAX_INFLIGHT_REQUESTS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[ServerProcess]:
    """A server that more than a few requests at once are too many for."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, devices=device.type, max_inflight_requests=MAX_INFLIGHT_REQUESTS) as server:
        server.wait_for_health()
        yield server


@contextmanager
def stuttering_worker(server: ServerProcess) -> Iterator[None]:
    """A worker that now and then stands still, so that requests pile up on the fastest machine too."""
    over = threading.Event()

    def stutter() -> None:
        while not over.wait(0.05):
            with server.frozen_worker():
                time.sleep(0.2)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_help_lists_the_commands_and_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sys.modules))\n"
        "sys.argv = ['fsa', '--help']\n"
        "from service.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    text, loaded = done.stdout.split("LOADED")
    assert all(name in text for name in ("serve", "config", "info", "attend", "bench", "tune"))
    heavy = {"torch", "triton", "numpy", "grpc", "google.protobuf", "pydantic", "rich", "safetensors"}
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize(
    "words", [["serve", "--prot", "1"], ["nonsense"], ["attend"], ["bench", "--slots", "-1"]]
)
def test_wrong_usage_is_exit_code_2_on_standard_error(fsa: Fsa, words: list[str]) -> None:
    outcome = fsa(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Error: " in outcome.err


@pytest.mark.parametrize("command", ["info", "bench"])
def test_a_server_that_is_not_there_is_one_line_that_says_what_to_do(fsa: Fsa, command: str) -> None:
    outcome = fsa(command, "--target", NOBODY)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"fsa: no server answers at {NOBODY}; start one with `fsa serve`")
    assert outcome.err.count("\n") == 1


class TestServe:
    def test_every_flag_is_a_setting(self, fsa: Fsa) -> None:
        words = fsa("serve", "--help").out.split()
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert flags - {"help", "no_reflection"} <= set(Settings.model_fields)

    def test_runs_with_the_flags_and_stops_at_ctrl_c(self) -> None:
        command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--metrics-port", "0"]
        with subprocess.Popen(
            [*command, "--devices", "cpu", "--log-format", "text"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["event"] == "listening"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors

    def test_does_not_start_with_a_table_that_is_not_valid(self, tmp_path: Path) -> None:
        table, config = tmp_path / "table.json", tmp_path / "fsa.toml"
        table.write_text('{"device": "nvidia-h200"}')
        config.write_text(f'tuning_file = "{table}"')
        command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config), "--devices", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        expected = (
            f"fsa: cannot start: tuning table {table} cannot be used: the table has no entries, provenance"
        )
        assert done.stderr.strip() == expected

    def test_does_not_start_with_a_backend_that_cannot_run_there(self) -> None:
        command = [sys.executable, "-m", "service.cli", "serve", "--backend", "triton", "--devices", "cpu"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("fsa: cannot start: backend 'triton' takes CUDA tensors")
        assert done.stderr.count("\n") == 1


class TestInfo:
    def test_prints_an_aligned_table(self, fsa: Fsa, server: ServerProcess) -> None:
        lines = fsa("info", "--target", server.target).out.splitlines()
        assert lines[0].split() == ["health", "SERVING"]
        values = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
        assert values["max_message_bytes"] == "512 MiB"
        assert values["block_sizes"] == "16, 32, 64, 128, 256"
        assert len({line.index(values[line.split()[0]].split()[0]) for line in lines[:2]}) == 1

    def test_prints_json_for_programs(self, fsa: Fsa, server: ServerProcess) -> None:
        info = json.loads(fsa("info", "--target", server.target, "--json").out)
        assert info["health"] == "SERVING"
        assert info["limits"]["max_message_bytes"] == 512 << 20
        assert info["devices"][0]["up"] is True
        assert [limits["name"] for limits in info["pattern_limits"]] == info["patterns"]

    def test_says_what_each_pattern_can_be(self, fsa: Fsa, server: ServerProcess) -> None:
        lines = fsa("info", "--target", server.target).out.splitlines()
        values = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
        shared = "at most 1024 blocks a row, a row a query or a block of queries"
        assert values["pattern block_csr"] == values["pattern block_mask"] == shared
        assert values["pattern vertical_slash"] == "at most 1024 blocks a row, causal only"
        assert values["pattern dense"] == "every block"


class TestInfoOfAShape:
    SHAPE = "q_heads=8,kv_heads=2,head_dim=128,block_size=64,slots=16"

    @pytest.fixture(autouse=True)
    def _shipped_tables_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.delenv("FSA_TUNING_FILE", raising=False)
        self.forget_tables()
        yield
        self.forget_tables()

    @staticmethod
    def forget_tables() -> None:
        for cached in (dispatch.choose, dispatch._nearest, tuning_table.table_for):
            cached.cache_clear()

    def test_says_which_path_it_takes_and_why(self, fsa: Fsa) -> None:
        outcome = fsa("info", "--shape", self.SHAPE, "--device", "NVIDIA H200", "--tokens", "1024")
        values = dict(re.split(r"  +", line, maxsplit=1) for line in outcome.out.splitlines())
        assert values["path"] in PATHS
        assert values["reason"].startswith("table nvidia-h200, entry g=4 D=128 16-bit up to 16 blocks of 64")
        assert values["workspace of 1024 tokens"].endswith("MiB")

    def test_says_so_where_queries_share_a_row(self, fsa: Fsa) -> None:
        shape = f"{self.SHAPE},query_block_size=64"
        answer = json.loads(fsa("info", "--shape", shape, "--device", "NVIDIA H200", "--json").out)
        assert answer["path"] == "query_tile"
        assert answer["reason"].startswith("64 queries share a row; sizes: table nvidia-h200")

    def test_prints_tiles_and_bytes_as_json(self, fsa: Fsa) -> None:
        words = ("--device", "Unheard-of 9000", "--path", "mixed", "--json")
        answer = json.loads(fsa("info", "--shape", f"{self.SHAPE},dtype=float32", *words).out)
        problem = CallShape.parse(f"{self.SHAPE},dtype=float32").problem(8192)
        plan = plan_forward(problem, path="mixed")
        assert answer["path"] == "mixed"
        assert answer["reason"] == "asked for; sizes: no table for Unheard-of 9000: defaults"
        assert answer["tiles"] == {"partial": asdict(plan.tile), "query": asdict(plan.query_tile)}
        assert answer["workspace_bytes"]["8192"] == plan.workspace_bytes
        assert set(answer["workspace_bytes"]) == {"8192", "65536"}

    @pytest.mark.parametrize(
        ("words", "message", "code"),
        [
            (["--path", "mixed"], "--device and --path say something about a --shape", 2),
            (["--shape", "q_heads=8"], "--shape has no kv_heads, head_dim, block_size, slots", 2),
            (["--shape", f"{SHAPE},heads=8"], "--shape has 'heads=8'; it takes q_heads, kv_heads", 2),
            (["--shape", f"{SHAPE},slots=many"], "--shape has slots=many; it must be a number", 2),
            (["--shape", f"{SHAPE},dtype=int8"], "--shape has dtype=int8; it can be bfloat16", 2),
            (["--shape", f"{SHAPE},kv_heads=3"], "--shape: k has 3 heads, q has 8", 2),
            (["--shape", f"{SHAPE},query_block_size=0"], "--shape: query_block_size is 0: expected", 2),
            (
                ["--shape", SHAPE + ",value_dim=" + "9" * 20],
                "--shape has value_dim=99999999999999999999; it",
                2,
            ),
            (["--shape", SHAPE, "--tokens", "1,x"], "--tokens is '1,x'; it must be positive integers", 2),
            (["--shape", SHAPE, "--device", "X", "--path", "union"], "path is 'union': expected one of", 1),
        ],
    )
    def test_what_it_cannot_take_is_one_line(
        self, fsa: Fsa, words: list[str], message: str, code: int
    ) -> None:
        outcome = fsa("info", *words)
        assert (outcome.code, outcome.out) == (code, "")
        assert outcome.err.startswith(f"fsa: {message}")
        assert outcome.err.count("\n") == 1

    @pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="there is a GPU")
    def test_without_a_gpu_one_must_be_named(self, fsa: Fsa) -> None:
        outcome = fsa("info", "--shape", self.SHAPE)
        assert (outcome.code, outcome.out) == (1, "")
        assert "name one with --device" in outcome.err


class TestTune:
    @pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="there is a GPU")
    def test_without_a_gpu_it_says_so_and_writes_nothing(self, fsa: Fsa, tmp_path: Path) -> None:
        output = tmp_path / "table.json"
        outcome = fsa("tune", "--output", output)
        assert outcome == (1, "", "fsa: fsa tune measures on a GPU, and torch sees none here\n")
        assert not output.exists()

    def test_a_shape_that_is_not_sound_is_wrong_usage(self, fsa: Fsa) -> None:
        outcome = fsa("tune", "--shape", "q_heads=8,kv_heads=2,head_dim=999,block_size=64,slots=16")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("fsa: --shape: ")


class TestAttend:
    @pytest.fixture
    def tensors(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        q, k, v = (
            rng.standard_normal((32, heads, 32), np.float32).astype(ml_dtypes.bfloat16) for heads in (4, 2, 2)
        )
        return {"q": q, "k": k, "v": v, "block_indices": np.zeros((1, 32, 1), np.int32)}

    @pytest.fixture
    def fsa_attend(self, fsa: Fsa, server: ServerProcess, tmp_path: Path) -> Callable[..., Outcome]:
        """Saves tensors and metadata, and runs ``fsa attend in.safetensors out.safetensors`` with words."""

        def run(tensors: dict[str, np.ndarray], *words: object, **metadata: str) -> Outcome:
            save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
            files = (tmp_path / "in.safetensors", tmp_path / "out.safetensors")
            return fsa("attend", *files, "--target", server.target, *words)

        return run

    @pytest.mark.parametrize(
        ("words", "metadata"),
        [
            (["--block-size", "16", "--softmax-scale", "0.5", "--no-causal"], {}),
            ([], {"block_size": "16", "softmax_scale": "0.5", "causal": "false"}),
            (
                ["--block-size", "16", "--no-causal"],
                {"block_size": "64", "softmax_scale": "0.5", "causal": "true"},
            ),
        ],
        ids=["flags", "metadata", "flags win"],
    )
    def test_writes_the_answer_of_the_file(
        self,
        fsa_attend: Callable[..., Outcome],
        server: ServerProcess,
        tmp_path: Path,
        tensors: dict[str, np.ndarray],
        words: list[str],
        metadata: dict[str, str],
    ) -> None:
        outcome = fsa_attend(tensors, "--json", *words, **metadata)
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert report["timings"]["kernel_seconds"] > 0
        with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
            assert file.metadata() == {"request_id": report["request_id"]}

        q, k, v, block_indices = tensors.values()
        with AttentionClient(server.target) as client:
            pattern = BlockIndices(block_indices, 16)
            answer = client.attend(q, k, v, pattern, softmax_scale=0.5, causal=False, return_lse=True)
        written = load_file(tmp_path / "out.safetensors")
        assert written["out"].dtype == ml_dtypes.bfloat16
        assert written["out"].tobytes() == answer.out.tobytes()
        assert written["lse"].tobytes() == answer.lse.tobytes()

    def test_packed_sequences_and_dense_come_from_the_file_too(
        self, fsa_attend: Callable[..., Outcome], tmp_path: Path, tensors: dict[str, np.ndarray]
    ) -> None:
        starts = np.array([0, 16, 32], np.int32)
        del tensors["block_indices"]
        outcome = fsa_attend({**tensors, "cu_seqlens_q": starts, "cu_seqlens_k": starts}, "--dense")
        assert outcome.code == 0, outcome.err
        assert [line.split()[0] for line in outcome.out.splitlines()][:3] == ["request", "receive", "queue"]
        # The first token of each sequence sees its own key alone.
        out = load_file(tmp_path / "out.safetensors")["out"]
        np.testing.assert_array_equal(out[16, 0], tensors["v"][16, 0])

    @pytest.mark.parametrize(
        ("missing", "words", "code", "message"),
        [
            ("k", ["--dense"], 1, "has no tensor 'k'; it has block_indices, q, v"),
            (
                "block_indices",
                [],
                1,
                "has no tensor 'block_indices'; add it, or attend to all keys with --dense",
            ),
            (None, [], 2, "give --block-size, or put block_size into the metadata of"),
            (None, ["--block-size", "17"], 1, "block_size"),
        ],
    )
    def test_what_the_file_lacks_is_said_in_one_line(
        self,
        fsa_attend: Callable[..., Outcome],
        tensors: dict[str, np.ndarray],
        missing: str | None,
        words: list[str],
        code: int,
        message: str,
    ) -> None:
        outcome = fsa_attend({name: array for name, array in tensors.items() if name != missing}, *words)
        assert (outcome.code, outcome.out) == (code, "")
        assert message in outcome.err
        assert outcome.err.count("\n") == 1

    def test_a_server_that_is_not_there_is_said_long_before_the_deadline(
        self, fsa_attend: Callable[..., Outcome], tensors: dict[str, np.ndarray]
    ) -> None:
        start = time.monotonic()
        outcome = fsa_attend(tensors, "--target", NOBODY, "--block-size", "16")
        assert time.monotonic() - start < 20
        assert outcome.err.startswith(f"fsa: no server answers at {NOBODY}; start one with `fsa serve`")

    def test_a_file_that_is_no_safetensors_is_said_in_one_line(self, fsa: Fsa, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_text("nothing of the kind")
        for source in (file, tmp_path / "absent"):
            outcome = fsa("attend", source, tmp_path / "out", "--dense")
            assert outcome.code == 1
            assert outcome.err.startswith(f"fsa: {source} cannot be read as safetensors")
            assert outcome.err.count("\n") == 1

    def test_an_answer_that_could_not_be_written_is_not_asked_for(self, fsa: Fsa, tmp_path: Path) -> None:
        for destination in (tmp_path, tmp_path / "absent" / "out"):
            outcome = fsa("attend", tmp_path / "in", destination, "--dense")
            assert outcome.code == 1
            assert outcome.err.startswith(f"fsa: {destination} cannot be written")
            assert outcome.err.count("\n") == 1

    def test_a_dtype_that_numpy_has_not_is_said_in_one_line(self, fsa: Fsa, tmp_path: Path) -> None:
        source = tmp_path / "in.safetensors"
        torch_safetensors.save_file({"q": torch.zeros(4, 2, 32).to(torch.float8_e4m3fn)}, source)
        outcome = fsa("attend", source, tmp_path / "out", "--dense")
        assert outcome.code == 1
        assert outcome.err.startswith(f"fsa: {source} has a tensor of a dtype that numpy has not")
        assert outcome.err.count("\n") == 1


class TestBench:
    SMALL = (
        "--tokens",
        64,
        "--heads",
        4,
        "--kv-heads",
        2,
        "--head-dim",
        32,
        "--block-size",
        16,
        "--slots",
        3,
    )

    def test_measures_every_concurrency_and_checks_answers(self, fsa: Fsa, server: ServerProcess) -> None:
        words = ("--target", server.target, *self.SMALL, "--concurrency", "1,4", "--requests", 20)
        outcome = fsa("bench", *words, "--processes", 2, "--json")
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        assert result["check"]["against"] == "oracle"
        assert [(run["concurrency"], run["answered"], run["failures"]) for run in result["runs"]] == [
            (1, 20, {}),
            (4, 20, {}),
        ]
        for run in result["runs"]:
            latency, stages = run["latency_seconds"], run["stages_seconds"]
            assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
            assert 0 < stages["kernel"]["p50"] < stages["total"]["p50"] < latency["p99"]
            assert run["tokens_per_second"] == pytest.approx(64 * run["requests_per_second"])

    def test_prints_tables_for_people(self, fsa: Fsa, server: ServerProcess) -> None:
        words = ("--target", server.target, *self.SMALL, "--concurrency", 1, "--duration", 0.3)
        outcome = fsa("bench", *words, "--dtype", "float16", "--processes", 1)
        assert outcome.code == 0, outcome.err
        first_words = [line.split()[0] for line in outcome.out.splitlines() if line]
        for name in ("request", "checked", "throughput", "latency", "queue", "kernel", "outside"):
            assert name in first_words

    def test_failures_are_counted_and_make_it_fail(self, fsa: Fsa, server: ServerProcess) -> None:
        words = ("--target", server.target, *self.SMALL, "--requests", 64, "--processes", 1, "--json")
        with stuttering_worker(server):
            outcome = fsa("bench", *words, "--concurrency", 4 * MAX_INFLIGHT_REQUESTS)
        (run,) = json.loads(outcome.out)["runs"]
        failed = run["failures"]["BUDGET_EXHAUSTED"]
        assert run["answered"] + failed == 64
        assert outcome.code == 1
        assert outcome.err == f"fsa: {failed} of 64 requests failed\n"

    def test_a_request_that_the_server_refuses_ends_it_at_once(self, fsa: Fsa, server: ServerProcess) -> None:
        outcome = fsa("bench", "--target", server.target, "--heads", 3, "--kv-heads", 2)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err.startswith("fsa: ")
        assert outcome.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("number", "code"),
        [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
        ids=["SIGINT", "SIGKILL"],
    )
    def test_it_leaves_no_process_when_it_is_ended(
        self, server: ServerProcess, number: signal.Signals, code: int
    ) -> None:
        command = [sys.executable, "-m", "service.cli", "bench", "--target", server.target]
        words = [str(word) for word in (*self.SMALL, "--concurrency", 2, "--duration", 60, "--processes", 2)]
        with subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            # Seen when the first process of the load is started: the signal comes among their starts.
            while not process.stdout.readline().startswith("checked"):
                pass
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does: to the whole group
            else:
                process.kill()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert errors == "" or number == signal.SIGKILL, "a process that is started half may say so"
        # One that was still loading modules first gets through them.
        eventually(lambda: not is_group_alive(process.pid), seconds=60, what="the end of the whole group")

"""Log records as programs and people read them."""

import contextvars
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service import telemetry
from service.config import LogFormat, LogLevel
from tests.serving import eventually, request_of, running_server


def record(message: str = "served", **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "fsa.access", "levelname": "INFO", "msg": message, **fields})
    made.created = 12.5
    return made


def formatted(formatter: logging.Formatter, made: logging.LogRecord, request_id: str = "") -> str:
    def run() -> str:
        telemetry.set_request_id(request_id)
        return formatter.format(made)

    return contextvars.copy_context().run(run)


def test_a_json_line_has_the_request_and_the_records_own_fields() -> None:
    line = formatted(telemetry.JsonFormatter(), record(code="OK", seconds=0.25), "id-1")
    assert json.loads(line) == {
        "time": 12.5,
        "level": "info",
        "logger": "fsa.access",
        "message": "served",
        "request_id": "id-1",
        "code": "OK",
        "seconds": 0.25,
    }


def test_a_message_with_line_breaks_stays_one_json_line() -> None:
    assert "\n" not in formatted(telemetry.JsonFormatter(), record("two\nlines"))


@pytest.mark.parametrize(
    "formatter", [telemetry.JsonFormatter(), telemetry.TextFormatter()], ids=("json", "text")
)
def test_the_cause_of_an_error_is_in_the_log(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        made = record(exc_info=sys.exc_info())
    assert "the cause" in formatted(formatter, made)


def test_a_text_line_reads_from_left_to_right() -> None:
    line = formatted(telemetry.TextFormatter(), record(code="OK"), "id-1")
    assert line.endswith("INFO fsa.access served request_id=id-1 code=OK")


def test_of_grpcs_errors_only_a_clients_departure_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    usual = root.handlers[:], root.level
    grpcs = logging.getLogger("grpc._cython.cygrpc")
    try:
        for level in (LogLevel.INFO, LogLevel.DEBUG):
            telemetry.configure_logging(level, LogFormat.JSON)
            grpcs.error("ExecuteBatchError raised in core by servicer method [%s]", "/a/b")
            grpcs.error("Unexpected [ValueError] raised by servicer method [%s]", "/a/b")
    finally:
        root.handlers[:], root.level = usual
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"].split()[0]) for line in lines] == [
        ("error", "Unexpected"),
        ("debug", "ExecuteBatchError"),
        ("error", "Unexpected"),
    ]


LEAVING_CLIENT = """
import sys
import grpc
channel = grpc.insecure_channel(sys.argv[1], [("grpc.max_receive_message_length", -1)])
raw = open(sys.argv[2], "rb").read()
calls = [channel.unary_unary("/fsa.v1.AttentionService/Attend").future(raw, timeout=60) for _ in range(8)]
sys.stdin.readline()
for call in calls:
    call.cancel()
sys.stdin.readline()
"""


def test_a_client_that_leaves_while_its_answers_are_sent_leaves_no_error(
    tmp_path: Path, make_case: Callable[..., Any], device: torch.device
) -> None:
    """Of more bytes than are on their way before somebody reads; the client stands still until it leaves."""
    case = make_case(q_lens=(10_000,), k_lens=(10_000,), head_dim=128, num_slots=1)
    (tmp_path / "request").write_bytes(request_of(case).SerializeToString())

    def num_answered() -> float:
        return server.metrics().get(("fsa_requests_total", "OK", "Attend"), 0)

    with running_server(tmp_path / "log", devices=device.type, log_level="debug") as server:
        server.wait_for_health()
        command = [sys.executable, "-c", LEAVING_CLIENT, server.target, str(tmp_path / "request")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None
            try:
                with server.frozen_worker():
                    eventually(lambda: server.metrics()["fsa_queue_depth",] == 6, what="requests queue up")
                    client.send_signal(signal.SIGSTOP)
                eventually(lambda: num_answered() == 8, seconds=60, what="answers")
                client.stdin.write("leave\n")
                client.stdin.flush()
                client.send_signal(signal.SIGCONT)
                eventually(lambda: server.metrics()["fsa_inflight_bytes", "host"] == 0, what="departures")
            finally:
                client.kill()
    levels = {json.loads(line)["level"] for line in (tmp_path / "log").read_text().splitlines()}
    assert "info" in levels
    assert "error" not in levels


def test_outside_of_a_request_there_is_no_id() -> None:
    assert "request_id" not in formatted(telemetry.TextFormatter(), record())
    assert "request_id" not in json.loads(formatted(telemetry.JsonFormatter(), record()))


@pytest.mark.parametrize(
    ("text", "is_id"), [("a", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False)]
)
def test_what_can_be_an_id(text: str, is_id: bool) -> None:
    assert telemetry.is_request_id(text) == is_id

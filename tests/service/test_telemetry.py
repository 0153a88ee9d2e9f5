"""Log records as programs and people read them."""

import contextvars
import json
import logging
import sys

import pytest

from service import telemetry


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


def test_outside_of_a_request_there_is_no_id() -> None:
    assert "request_id" not in formatted(telemetry.TextFormatter(), record())
    assert "request_id" not in json.loads(formatted(telemetry.JsonFormatter(), record()))


@pytest.mark.parametrize(
    ("text", "is_id"), [("a", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False)]
)
def test_what_can_be_an_id(text: str, is_id: bool) -> None:
    assert telemetry.is_request_id(text) == is_id

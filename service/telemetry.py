"""Structured logs: one record a line, each with the id of the request it belongs to."""

import contextvars
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from service.config import LogFormat, LogLevel

MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID_LENGTH}}}")

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("fsa_request_id", default="")


def is_request_id(text: str) -> bool:
    """Whether ``text`` can be an id: 1 to 128 printable ASCII characters without spaces."""
    return _REQUEST_ID.fullmatch(text) is not None


def new_request_id() -> str:
    return uuid.uuid4().hex


def set_request_id(request_id: str) -> None:
    """Name the request that the current task works for."""
    _request_id.set(request_id)


def request_id() -> str:
    """The id of the request that the current task works for; empty outside of one."""
    return _request_id.get()


class JsonFormatter(logging.Formatter):
    """time (seconds since 1970), level, logger, message, request_id, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id():
            entry["request_id"] = current
        entry.update(_fields(record))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """The same for people: ``12:30:01.123 INFO fsa.access message request_id=... field=...``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{clock}.{int(record.msecs):03d} {record.levelname} {record.name} {record.getMessage()}"
        fields = {"request_id": request_id(), **_fields(record)}
        line = " ".join([head, *(f"{name}={value}" for name, value in fields.items() if value != "")])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send every record of ``level`` and above to standard error, in ``log_format``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_tell_departures_as_debug)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _tell_departures_as_debug(record: logging.LogRecord) -> bool:
    """gRPC calls it an error that a client left while its answer, or its error, was being sent."""
    if record.name.startswith("grpc.") and record.getMessage().startswith("ExecuteBatchError raised in core"):
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}

"""Strict parsing of protobuf messages, with their payloads left where they were received.

Protobuf itself copies every ``bytes`` field twice on its way to Python, and skips fields that it does
not know. Here ``bytes`` fields are cut out of the message and handed over as views, protobuf reads the
small rest, and whatever it did not know is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from service import wire
from service.errors import FsaError

# A request has a few dozen fields. Walking millions of empty ones would hold up everyone else.
MAX_FIELDS = 20_000
# Of a text, or of numbers one behind the other: millions of sequences.
MAX_SCALAR_BYTES = 8 << 20

_LENGTH_DELIMITED = 2
_EMPTY = memoryview(b"")

Path = tuple[str, ...]
M = TypeVar("M", bound=Message)


def parse(message_type: type[M], raw: bytes) -> tuple[M, Mapping[Path, memoryview]]:
    """The message, its ``bytes`` fields empty, and the views of these by their path of field names.

    As protobuf has it, the last of several values of a field counts.

    Raises FsaError: MALFORMED_MESSAGE, UNKNOWN_FIELD or LIMIT_EXCEEDED.
    """
    cut = _Cut(message_type.DESCRIPTOR)
    try:
        message = message_type.FromString(b"".join(cut.without_payloads(memoryview(raw))))
    except (DecodeError, ValueError, OverflowError) as error:
        raise FsaError(
            "MALFORMED_MESSAGE", f"the bytes are no {_name(message_type.DESCRIPTOR)} message"
        ) from error
    _refuse_unknown_fields(message)
    return message, cut.payloads


class _Cut:
    """One pass over a message that sets its payloads aside."""

    def __init__(self, descriptor: Any) -> None:
        self.payloads: dict[Path, memoryview] = {}
        self._descriptor = descriptor
        self._num_fields = 0

    def without_payloads(self, message: memoryview) -> list[wire.Buffer]:
        return self._walk(message, self._descriptor, ())

    def _walk(self, message: memoryview, descriptor: Any, path: Path) -> list[wire.Buffer]:
        parts: list[wire.Buffer] = []
        for number, whole, value in wire.fields(message):
            self._num_fields += 1
            if self._num_fields > MAX_FIELDS:
                raise ValueError("too many fields")
            field = descriptor.fields_by_number.get(number)
            if field is None or whole[0] & 7 != _LENGTH_DELIMITED:
                parts.append(whole)
            elif field.type == FieldDescriptor.TYPE_BYTES:
                self.payloads[(*path, field.name)] = value
                parts += wire.length_delimited(number, [_EMPTY])
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                below = self._walk(value, field.message_type, (*path, field.name))
                parts += wire.length_delimited(number, below)
            else:
                self._check_length(field.name, len(value))
                parts.append(whole)
        return parts

    @staticmethod
    def _check_length(name: str, num_bytes: int) -> None:
        if num_bytes > MAX_SCALAR_BYTES:
            raise FsaError(
                "LIMIT_EXCEEDED",
                f"{name} takes {num_bytes} bytes; at most {MAX_SCALAR_BYTES} are read",
                metadata={"limit": name, "value": str(num_bytes), "max": str(MAX_SCALAR_BYTES)},
            )


def _refuse_unknown_fields(message: Message) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number, name = unknown[0].field_number, _name(message.DESCRIPTOR)
        raise FsaError(
            "UNKNOWN_FIELD",
            f"{name} has no field {number}, or not of this type, in the protocol that this server speaks",
            metadata={"message": name, "field_number": str(number)},
        )
    for below in _submessages(message):
        _refuse_unknown_fields(below)


def _submessages(message: Message) -> Iterator[Message]:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield value


def _name(descriptor: Any) -> str:
    return str(descriptor.name)

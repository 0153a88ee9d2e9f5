"""Just enough of the protobuf wire format to keep tensor payloads out of protobuf's own buffers.

Setting ``bytes`` in a message and serializing it copies a payload four times; a message framed from
buffers copies it once, and one that is scanned hands out views. Protobuf still writes and reads every
other field. Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator, Sequence

Buffer = bytes | memoryview

_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}
_MAX_VARINT_BYTES = 10


def length_delimited(number: int, parts: Sequence[Buffer]) -> list[Buffer]:
    """The buffers of field ``number`` whose value is ``parts``, one after the other."""
    length = sum(len(part) for part in parts)
    return [_varint(number << 3 | _LENGTH_DELIMITED) + _varint(length), *parts]


def fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Walks a message: each field's number, all of its bytes, and its value without tag and length.

    Raises ValueError when the bytes are not a message.
    """
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value_start = position
            _, position = _read_varint(message, position)
        else:
            if wire_type == _LENGTH_DELIMITED:
                length, position = _read_varint(message, position)
            elif wire_type in _FIXED_BYTES:
                length = _FIXED_BYTES[wire_type]
            else:
                raise ValueError(f"field {number} has wire type {wire_type}, which nothing here uses")
            value_start = position
            position += length
            if position > len(message):
                raise ValueError(f"field {number} ends past the end of its message")
        yield number, message[start:position], message[value_start:position]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a varint has no end")

"""service.wire: framing and scanning agree with protobuf, and no bytes make the scan go wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import wire
from service.pb.fsa.v1 import attention_pb2, tensor_pb2


@given(payload=st.binary(max_size=300), shape=st.lists(st.integers(0, 2**40), max_size=4))
def test_a_framed_tensor_is_the_message_that_protobuf_writes(payload: bytes, shape: list[int]) -> None:
    header = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT16, shape=shape).SerializeToString()
    framed = [header, *wire.length_delimited(3, [memoryview(payload)])]
    expected = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT16, shape=shape, inline=payload)
    assert b"".join(framed) == expected.SerializeToString()


def test_the_scan_finds_every_field_and_hands_out_views_of_the_message() -> None:
    timings = attention_pb2.Timings(queue=0.5, batch_requests=300)
    message = attention_pb2.AttendResponse(request_id="r", timings=timings).SerializeToString()
    found = list(wire.fields(memoryview(message)))
    assert [number for number, _, _ in found] == [1, 4]
    assert bytes(found[0][2]) == b"r"
    assert attention_pb2.Timings.FromString(found[1][2]) == timings
    assert b"".join(whole for _, whole, _ in found) == message
    assert all(value.obj is message for _, _, value in found)


@given(data=st.binary(max_size=64))
def test_random_bytes_are_refused_or_taken_apart_whole(data: bytes) -> None:
    try:
        found = list(wire.fields(memoryview(data)))
    except ValueError:
        return
    assert b"".join(whole for _, whole, _ in found) == data


@pytest.mark.parametrize(
    "data",
    [b"\x08", b"\x0a\x05abc", b"\x09\x00", b"\x0b", b"\xff" * 11],
    ids=["no value", "length past the end", "short fixed64", "group", "endless varint"],
)
def test_a_message_that_is_cut_or_ill_formed_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"field|varint"):
        list(wire.fields(memoryview(data)))

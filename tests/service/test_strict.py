"""Messages are taken as protobuf takes them, or refused."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service import strict, wire
from service.errors import FsaError
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

Request = attention_pb2.AttendRequest


def example() -> attention_pb2.AttendRequest:
    return Request(
        request_id="r",
        q=tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT16, shape=[1, 2, 3], inline=b"qqqq"),
        pattern=pattern_pb2.SparsityPattern(
            block_indices=pattern_pb2.BlockIndices(indices=tensor_pb2.Tensor(inline=b"ii"), block_size=16)
        ),
        cu_seqlens_q=[0, 300],
        softmax_scale=0.5,
    )


def refusal(raw: bytes) -> FsaError:
    with pytest.raises(FsaError) as caught:
        strict.parse(Request, raw)
    return caught.value


def test_payloads_are_views_of_the_received_bytes_and_the_rest_is_as_sent() -> None:
    raw = example().SerializeToString()
    message, payloads = strict.parse(Request, raw)
    found = {path: bytes(view) for path, view in payloads.items()}
    assert found == {("q", "inline"): b"qqqq", ("pattern", "block_indices", "indices", "inline"): b"ii"}
    assert all(view.obj is raw for view in payloads.values())
    expected = example()
    expected.q.inline = b""
    expected.pattern.block_indices.indices.inline = b""
    assert message == expected


def test_repeated_fields_merge_as_protobuf_merges_them() -> None:
    raw = example().SerializeToString() + Request(q=tensor_pb2.Tensor(inline=b"new")).SerializeToString()
    message, payloads = strict.parse(Request, raw)
    whole = Request.FromString(raw)
    assert bytes(payloads["q", "inline"]) == whole.q.inline == b"new"
    assert list(message.q.shape) == list(whole.q.shape)


def test_a_payload_of_a_variant_that_was_replaced_does_not_count() -> None:
    dense = Request(pattern=pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense()))
    message, _ = strict.parse(Request, example().SerializeToString() + dense.SerializeToString())
    assert message.pattern.WhichOneof("kind") == "dense"


def test_a_variant_that_comes_twice_is_merged_unless_another_came_between() -> None:
    def csr(**tensors: bytes) -> bytes:
        fields = {name: tensor_pb2.Tensor(inline=payload) for name, payload in tensors.items()}
        pattern = pattern_pb2.SparsityPattern(block_csr=pattern_pb2.BlockCsr(**fields))
        return Request(pattern=pattern).SerializeToString()

    dense = Request(pattern=pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense())).SerializeToString()
    first, second = csr(offsets=b"old", indices=b"ids"), csr(offsets=b"new")
    for raw in (first + second, first + dense + second):
        message, payloads = strict.parse(Request, raw)
        whole = Request.FromString(raw).pattern.block_csr
        assert message.pattern.block_csr.HasField("indices") == whole.HasField("indices")
        assert payloads["pattern", "block_csr", "offsets", "inline"] == whole.offsets.inline == b"new"


@pytest.mark.parametrize(
    ("raw", "message", "number"),
    [
        (b"\xa8\x06\x01", "AttendRequest", "101"),
        (Request(q=tensor_pb2.Tensor()).SerializeToString()[:-1] + b"\x02\x28\x01", "Tensor", "5"),
        (b"\x10\x01", "AttendRequest", "2"),
        (b"\x2a\x04\x3a\x02\x08\x01", "SparsityPattern", "7"),
    ],
    ids=["top level", "a later transport", "another wire type", "a later pattern"],
)
def test_a_field_that_is_not_known_is_named(raw: bytes, message: str, number: str) -> None:
    error = refusal(raw)
    assert error.reason == "UNKNOWN_FIELD"
    assert error.metadata == {"message": message, "field_number": number}


@pytest.mark.parametrize(
    "raw",
    [b"\x0a\x05ab", b"\xff" * 20, b"\x0a\x01\xff", b"\x0b\x0c", b"\x00\x00", b"\x12\x05\x1a\x7fabc"],
    ids=["cut off", "endless varint", "not UTF-8", "group", "field 0", "payload past its message"],
)
def test_bytes_that_are_no_message_are_malformed(raw: bytes) -> None:
    assert refusal(raw).reason == "MALFORMED_MESSAGE"


def test_a_flood_of_numbers_in_one_field_is_refused_before_it_is_read() -> None:
    numbers = bytes(strict.MAX_SCALAR_BYTES + 1)
    raw = b"".join(map(bytes, wire.length_delimited(Request.CU_SEQLENS_Q_FIELD_NUMBER, [numbers])))
    error = refusal(raw)
    assert (error.reason, error.metadata["limit"]) == ("LIMIT_EXCEEDED", "cu_seqlens_q")


def test_a_flood_of_tiny_fields_is_refused_quickly() -> None:
    assert refusal(b"\x38\x01" * (strict.MAX_FIELDS + 1)).reason == "MALFORMED_MESSAGE"


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_what_is_taken_reads_as_protobuf_reads_it(raw: bytes) -> None:
    try:
        message, payloads = strict.parse(Request, raw)
    except FsaError as error:
        event(error.reason)
        return
    for path, payload in payloads.items():
        if path[:-1] in (("q",), ("k",), ("v",)):
            getattr(message, path[0]).inline = bytes(payload)
    assert message == Request.FromString(raw)

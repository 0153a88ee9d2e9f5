"""Bytes to a validated call in the arena, and the answer back to bytes."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fsa_core.patterns import expand_query_blocks
from service import codec, tensors
from service.errors import FsaError
from service.job import Field, Layout
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2
from tests.serving import request_of, tensor_message, tensor_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def written(request: attention_pb2.AttendRequest) -> tuple[codec.AttendCall, memoryview]:
    """The decoded call and a memory that it was written to, NaN wherever nothing was."""
    call = codec.decode_attend(request.SerializeToString())
    memory = memoryview(bytearray(b"\xff" * Layout.of(call.problem).total_bytes))
    codec.write_inputs(call, memory)
    return call, memory


def at(memory: memoryview, field: Field) -> torch.Tensor:
    raw = torch.frombuffer(memory, dtype=torch.uint8)[field.offset : field.offset + field.num_bytes]
    return raw.view(field.dtype).view(field.shape)


def refusal(request: attention_pb2.AttendRequest) -> FsaError:
    with pytest.raises(FsaError) as caught:
        codec.decode_attend(request.SerializeToString())
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["selected", "dense"])
def test_inputs_reach_the_arena_bit_by_bit(make_case: Callable[..., Any], dtype: Any, dense: bool) -> None:
    case = make_case(dtype=dtype, dense=dense, q_lens=(5, 20), k_lens=(9, 20), value_dim=24)
    call, memory = written(request_of(case))
    assert call.problem == case.problem
    layout = Layout.of(call.problem)
    for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "block_indices"):
        sent = getattr(case, name)
        if sent is not None:
            assert torch.equal(at(memory, getattr(layout, name)), sent.cpu()), name


def test_one_sequence_and_the_default_scale_are_filled_in(make_case: Callable[..., Any]) -> None:
    request = request_of(make_case(q_lens=(7,), k_lens=(30,), head_dim=64))
    request.ClearField("cu_seqlens_q")
    request.ClearField("cu_seqlens_k")
    request.ClearField("softmax_scale")
    call, memory = written(request)
    layout = Layout.of(call.problem)
    assert call.problem.softmax_scale == 0.125
    assert at(memory, layout.cu_seqlens_q).tolist() == [0, 7]
    assert at(memory, layout.cu_seqlens_k).tolist() == [0, 30]


@pytest.mark.parametrize("padding", range(4))
def test_indices_are_read_right_wherever_they_lie_in_the_message(
    make_case: Callable[..., Any], padding: int
) -> None:
    case = make_case()
    call, memory = written(request_of(case, request_id="x" * (1 + padding)))
    assert torch.equal(at(memory, Layout.of(call.problem).block_indices), case.block_indices.cpu())


def test_rows_for_blocks_of_queries_become_rows_for_tokens(make_case: Callable[..., Any]) -> None:
    case = make_case(q_lens=(9, 5), k_lens=(40, 5), num_slots=2)
    request = request_of(case)
    rows = torch.tensor([[0, 2], [1, 0], [0, -1], [0, -1], [-1, -1]], dtype=torch.int32)[None]
    request.pattern.block_indices.indices.CopyFrom(tensor_message(rows))
    request.pattern.block_indices.query_block_size = 4
    call, memory = written(request)
    expected = expand_query_blocks(
        rows,
        query_block_size=4,
        block_size=case.problem.block_size,
        cu_seqlens_q=case.cu_seqlens_q.cpu(),
        cu_seqlens_k=case.cu_seqlens_k.cpu(),
        causal=True,
    )
    assert torch.equal(at(memory, Layout.of(call.problem).block_indices), expected)


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_a_response_is_what_protobuf_would_have_written(
    make_case: Callable[..., Any], tokens: int, return_lse: bool
) -> None:
    request = request_of(make_case(q_lens=(tokens,), k_lens=(80,), dtype=torch.bfloat16))
    request.return_lse = return_lse
    call, memory = written(request)
    layout = Layout.of(call.problem)
    for field in (layout.out, layout.lse):
        at(memory, field).copy_(torch.randn(field.shape))
    timings = attention_pb2.Timings(receive=0.5, kernel=2.0, batch_requests=3)
    clock = codec.SendClock(time.perf_counter() - 2.0, time.perf_counter() - 1.0)
    encoded = codec.encode_attend("id", call, memory, timings, clock)
    response = attention_pb2.AttendResponse.FromString(encoded)
    assert response.SerializeToString() == encoded
    assert response.request_id == "id"
    assert torch.equal(tensor_of(response.out), at(memory, layout.out))
    assert response.HasField("lse") == return_lse
    if return_lse:
        assert torch.equal(tensor_of(response.lse), at(memory, layout.lse))
    assert call.answer_bytes == len(response.out.inline) + len(response.lse.inline)
    assert response.timings == timings
    assert 1.0 < timings.send < timings.total - 0.9


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": 0}, "INVALID_DTYPE"),
        ({"dtype": 77}, "INVALID_DTYPE"),
        ({"shape": [-1, 4, 16]}, "INVALID_SHAPE"),
        ({"shape": [2**62, 2**62, 2**62]}, "INVALID_SHAPE"),
        ({"shape": [2**62, 2**62, 0]}, "INVALID_SHAPE"),
        ({"shape": [1] * 9}, "INVALID_SHAPE"),
        ({"shape": [1, 1, 16]}, "INVALID_BYTE_COUNT"),
        ({"shape": []}, "INVALID_BYTE_COUNT"),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_add_up_is_refused_by_name(
    make_case: Callable[..., Any], name: str, changes: dict[str, Any], reason: str
) -> None:
    request = request_of(make_case(), request_id="mine")
    tensor = getattr(request, name)
    if "dtype" in changes:
        tensor.dtype = changes["dtype"]
    if "shape" in changes:
        tensor.shape[:] = changes["shape"]
    error = refusal(request)
    assert (error.reason, error.metadata["field"], error.request_id) == (reason, name, "mine")


def test_the_first_bad_index_is_named_by_head_token_and_slot(make_case: Callable[..., Any]) -> None:
    case = make_case(index_heads=2, num_slots=3)
    case.block_indices[1, 33, 2] = 99
    error = refusal(request_of(case))
    assert error.reason == "INDEX_OUT_OF_RANGE"
    assert {name: error.metadata[name] for name in ("head", "token", "slot", "value")} == {
        "head": "1",
        "token": "33",
        "slot": "2",
        "value": "99",
    }


def test_sizes_are_refused_before_a_pattern_of_them_is_looked_at() -> None:
    """Without tokens heads take no byte, and a mask of as many none either."""
    heads = 1 << 40
    empty = {"dtype": tensor_pb2.DTYPE_FLOAT16, "inline": b""}
    q, k = (tensor_pb2.Tensor(shape=[0, h, 64], **empty) for h in (heads, 1))
    mask = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[heads, 0, 0], inline=b"")
    block_mask = pattern_pb2.BlockMask(mask=mask, block_size=64, query_block_size=64)
    request = attention_pb2.AttendRequest(q=q, k=k, v=k, cu_seqlens_q=[0] * 9, causal=True)
    request.pattern.block_mask.CopyFrom(block_mask)
    seen: list[codec.DeclaredSizes] = []

    def check_sizes(sizes: codec.DeclaredSizes) -> None:
        seen.append(sizes)
        raise FsaError("LIMIT_EXCEEDED", "too many heads")

    with pytest.raises(FsaError, match="too many heads"):
        codec.decode_attend(request.SerializeToString(), check_sizes)
    assert seen == [codec.DeclaredSizes(0, 0, 8, heads)]


@pytest.mark.parametrize("field", ["q", "k", "v", "pattern"])
def test_what_is_missing_is_named(make_case: Callable[..., Any], field: str) -> None:
    request = request_of(make_case())
    request.ClearField(field)
    error = refusal(request)
    assert (error.reason, error.metadata) == ("MISSING_FIELD", {"field": field})


def test_a_tensor_without_a_payload_is_missing_it(make_case: Callable[..., Any]) -> None:
    request = request_of(make_case())
    request.k.ClearField("inline")
    assert refusal(request).metadata == {"field": "k.inline"}


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "é", "line\nbreak"])
def test_an_id_that_could_not_be_logged_is_refused(make_case: Callable[..., Any], request_id: str) -> None:
    assert refusal(request_of(make_case(), request_id=request_id)).reason == "INVALID_REQUEST_ID"


def test_every_dtype_of_the_wire_has_one_of_torch() -> None:
    known = set(tensor_pb2.Dtype.values()) - {tensor_pb2.DTYPE_UNSPECIFIED}
    assert set(tensors.DTYPES) == known

"""What the client writes is what protobuf would write, and what it reads keeps every bit."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from service.client import BlockCsr, BlockIndices, BlockMask, Dense, Select, VerticalSlash
from service.client.messages import AttendCall
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

NUMPY_DTYPES = {
    tensor_pb2.DTYPE_FLOAT16: np.float16,
    tensor_pb2.DTYPE_BFLOAT16: ml_dtypes.bfloat16,
    tensor_pb2.DTYPE_FLOAT32: np.float32,
}
TORCH_DTYPES = {
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
}


def encode(q: Any, k: Any, v: Any, pattern: Any, **options: Any) -> AttendCall[Any]:
    defaults = {
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "softmax_scale": None,
        "causal": True,
        "return_lse": False,
        "request_id": "id",
        "priority": 0,
    }
    return AttendCall.of(q, k, v, pattern, **(defaults | options))


def decoded(call: AttendCall[Any]) -> attention_pb2.AttendRequest:
    return attention_pb2.AttendRequest.FromString(call.payload)


def random_bits(shape: tuple[int, ...], itemsize: int) -> bytes:
    """Every bit pattern can come up, NaN payloads and -0.0 among them."""
    return np.random.default_rng(0).bytes(int(np.prod(shape)) * itemsize)


def wire_tensor(dtype: int, shape: tuple[int, ...], data: bytes) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, inline=data)


@pytest.mark.parametrize("softmax_scale", [None, 0.0, 0.25])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_request_is_byte_for_byte_what_protobuf_writes(tokens: int, softmax_scale: float | None) -> None:
    q = np.ones((tokens, 4, 16), np.float16)
    k = np.ones((tokens, 2, 16), np.float16)
    indices = np.zeros((1, tokens, 2), np.int32)
    call = encode(
        q,
        k,
        k,
        BlockIndices(indices, 64, 2),
        cu_seqlens_q=[0, tokens],
        cu_seqlens_k=np.array([0, tokens], np.int32),
        softmax_scale=softmax_scale,
        return_lse=True,
        priority=7,
    )
    blocks = pattern_pb2.BlockIndices(
        indices=wire_tensor(tensor_pb2.DTYPE_INT32, indices.shape, indices.tobytes()),
        block_size=64,
        query_block_size=2,
    )
    expected = attention_pb2.AttendRequest(
        request_id="id",
        q=wire_tensor(tensor_pb2.DTYPE_FLOAT16, q.shape, q.tobytes()),
        k=wire_tensor(tensor_pb2.DTYPE_FLOAT16, k.shape, k.tobytes()),
        v=wire_tensor(tensor_pb2.DTYPE_FLOAT16, k.shape, k.tobytes()),
        pattern=pattern_pb2.SparsityPattern(block_indices=blocks),
        cu_seqlens_q=[0, tokens],
        cu_seqlens_k=[0, tokens],
        softmax_scale=softmax_scale,
        causal=True,
        return_lse=True,
        priority=7,
    )
    assert call.payload == expected.SerializeToString()


CSR = (np.array([[0, 2, 3], [3, 3, 4]], np.int32), np.array([0, 1, 0, 5], np.int32))
LINES = (np.array([[0, 3]], np.int32), np.array([[1]], np.int32))
MASK = np.array([[[True, False], [True, True]]])
INT32, BOOL = tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_BOOL


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("kind", "arrays", "sizes", "message"),
    [
        (
            BlockCsr,
            CSR,
            (64, 2),
            pattern_pb2.SparsityPattern(
                block_csr=pattern_pb2.BlockCsr(
                    offsets=wire_tensor(INT32, (2, 3), CSR[0].tobytes()),
                    indices=wire_tensor(INT32, (4,), CSR[1].tobytes()),
                    block_size=64,
                    query_block_size=2,
                )
            ),
        ),
        (
            BlockMask,
            (MASK,),
            (32, 8),
            pattern_pb2.SparsityPattern(
                block_mask=pattern_pb2.BlockMask(
                    mask=wire_tensor(BOOL, (1, 2, 2), b"\1\0\1\1"), block_size=32, query_block_size=8
                )
            ),
        ),
        (
            VerticalSlash,
            LINES,
            (128,),
            pattern_pb2.SparsityPattern(
                vertical_slash=pattern_pb2.VerticalSlash(
                    vertical=wire_tensor(INT32, (1, 2), LINES[0].tobytes()),
                    slash=wire_tensor(INT32, (1, 1), LINES[1].tobytes()),
                    block_size=128,
                )
            ),
        ),
    ],
    ids=["csr", "mask", "vertical-slash"],
)
def test_each_pattern_is_what_protobuf_would_have_written(
    convert: Any, kind: Any, arrays: Any, sizes: Any, message: pattern_pb2.SparsityPattern
) -> None:
    q = np.ones((2, 1, 16), np.float32)
    call = encode(q, q, q, kind(*map(convert, arrays), *sizes))
    assert decoded(call).pattern == message
    assert message.SerializeToString() in call.payload


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_selection_is_what_protobuf_would_have_written(convert: Any) -> None:
    q, gates = np.ones((2, 1, 16), np.float32), np.full((2, 1, 3), 0.5, np.float32)
    selection = Select(8, 4, 16, 3, 0, 1, top_p=0.9, gates=convert(gates), window=20)
    sizes = {"kernel_size": 8, "stride": 4, "block_size": 16, "top_k": 3, "num_local_blocks": 1, "top_p": 0.9}
    message = pattern_pb2.Select(
        **sizes, gates=wire_tensor(tensor_pb2.DTYPE_FLOAT32, (2, 1, 3), gates.tobytes()), window=20
    )
    assert decoded(encode(q, q, q, selection)).pattern.select == message
    # A window is one of the branches that gates add.
    alone = dataclasses.replace(selection, gates=None, return_block_indices=True)
    expected = pattern_pb2.Select(**sizes, return_block_indices=True)
    assert decoded(encode(q, q, q, alone)).pattern.select == expected


def test_dense_and_non_causal_arrive() -> None:
    q = np.ones((2, 1, 16), np.float32)
    request = decoded(encode(q, q, q, Dense(), causal=False))
    assert request.pattern.WhichOneof("kind") == "dense"
    assert not request.causal


def test_a_request_without_an_id_gets_one_of_its_own() -> None:
    q = np.ones((1, 1, 16), np.float32)
    calls = [encode(q, q, q, Dense(), request_id=None) for _ in range(2)]
    assert calls[0].request_id == decoded(calls[0]).request_id
    assert len({call.request_id for call in calls}) == 2


@pytest.mark.parametrize(
    "array",
    [
        np.arange(96, dtype=np.float32).reshape(2, 3, 16).transpose(1, 0, 2),
        np.arange(96, dtype=">f4").reshape(3, 2, 16),
        torch.arange(96.0).reshape(2, 3, 16).transpose(0, 1),
        torch.arange(96.0).reshape(3, 2, 16).requires_grad_(),
    ],
    ids=["numpy view", "big-endian", "torch view", "needs gradient"],
)
def test_any_layout_is_sent_row_major_and_little_endian(array: Any) -> None:
    sent = decoded(encode(array, array, array, Dense())).q
    values = array.detach().numpy() if isinstance(array, torch.Tensor) else array
    assert list(sent.shape) == [3, 2, 16]
    np.testing.assert_array_equal(np.frombuffer(sent.inline, "<f4").reshape(3, 2, 16), values)


@pytest.mark.parametrize("wire_dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_every_bit_survives_both_ways(kind: str, wire_dtype: int) -> None:
    shape = (5, 2, 16)
    data = random_bits(shape, np.dtype(NUMPY_DTYPES[wire_dtype]).itemsize)
    if kind == "numpy":
        q: Any = np.frombuffer(data, NUMPY_DTYPES[wire_dtype]).reshape(shape)
    else:
        q = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[wire_dtype]).reshape(shape)
    call = encode(q, q, q, Dense())
    assert decoded(call).q == wire_tensor(wire_dtype, shape, data)

    response = attention_pb2.AttendResponse(request_id="id", out=wire_tensor(wire_dtype, shape, data))
    out = call.result(response.SerializeToString()).out
    assert type(out) is type(q)
    assert out.dtype == q.dtype
    raw = out.view(torch.uint8).numpy() if kind == "torch" else out.view(np.uint8)
    assert raw.tobytes() == data


def test_an_answer_is_writable_memory_of_its_own_at_an_aligned_address() -> None:
    q = np.ones((1, 1, 16), np.float32)
    for request_id in ("", "a", "ab", "abc"):  # moves the payload inside the message
        out = wire_tensor(tensor_pb2.DTYPE_FLOAT32, (1, 1, 16), q.tobytes())
        reply = attention_pb2.AttendResponse(request_id=request_id, out=out).SerializeToString()
        answer = encode(q, q, q, Dense()).result(reply).out
        assert answer.flags.writeable
        assert answer.flags.aligned


def test_lse_and_timings_come_with_the_answer() -> None:
    q = np.ones((2, 1, 16), np.float16)
    response = attention_pb2.AttendResponse(
        request_id="id",
        out=wire_tensor(tensor_pb2.DTYPE_FLOAT16, q.shape, q.tobytes()),
        lse=wire_tensor(tensor_pb2.DTYPE_FLOAT32, (2, 1), np.array([1, 2], np.float32).tobytes()),
        timings=attention_pb2.Timings(queue=1, receive=2, h2d=3, kernel=4, d2h=5, send=6, total=7),
    )
    answer = encode(q, q, q, Dense()).result(response.SerializeToString())
    np.testing.assert_array_equal(answer.lse, np.array([[1], [2]], np.float32))
    t = answer.timings
    seconds = (t.queue_seconds, t.receive_seconds, t.h2d_seconds, t.kernel_seconds, t.d2h_seconds)
    assert (*seconds, t.send_seconds, t.total_seconds) == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": [[1.0]]}, "q must be a numpy array or a torch tensor, not list"),
        ({"k": np.ones((1, 1, 16))}, "k is float64; the service takes float16 or bfloat16 or float32"),
        ({"v": torch.ones(1, 1, 16, dtype=torch.int32)}, "v is int32"),
        ({"pattern": BlockIndices(np.zeros((1, 1, 1), np.int64), 16)}, "block_indices is int64"),
        (
            {"pattern": BlockMask(np.zeros((1, 1, 1), np.int32), 16, 1)},
            "mask is int32; the service takes bool",
        ),
        ({"pattern": BlockCsr(np.zeros((1, 1), np.int64), CSR[1], 16)}, "offsets is int64"),
        ({"pattern": VerticalSlash(LINES[0], [0], 16)}, "slash must be a numpy array or a torch tensor"),
        ({"pattern": np.zeros((1, 1, 1), np.int32)}, "Dense or Select, not ndarray"),
        ({"cu_seqlens_q": 4}, "cu_seqlens_q must be a sequence of integers, not int"),
        ({"cu_seqlens_k": [0, 0.5]}, r"cu_seqlens_k holds \[0, 0.5\]: "),
        ({"softmax_scale": "x"}, "softmax_scale is 'x': "),
        ({"request_id": 5}, "request_id is 5: "),
        ({"priority": -1}, "priority is -1: "),
        ({"pattern": BlockIndices(np.zeros((1, 1, 1), np.int32), "64")}, "block_size is '64': "),
        ({"pattern": BlockIndices(np.zeros((1, 1, 1), np.int32), 2**40)}, "block_size is 1099511627776: "),
    ],
)
def test_what_cannot_be_sent_is_an_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    q = np.ones((1, 1, 16), np.float32)
    arguments = {"q": q, "k": q, "v": q, "pattern": Dense()} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        encode(**arguments)

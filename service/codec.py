"""Wire bytes to a validated call and back, each payload copied once: into the arena, and out of it."""

import io
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fsa_core.packing import single_sequence
from fsa_core.patterns import expand_query_blocks
from fsa_core.problem import Problem
from fsa_core.validation import InputError, validate_dense, validate_selected
from service import strict, wire
from service.errors import FsaError
from service.job import Field, Layout
from service.pb.fsa.v1 import attention_pb2, tensor_pb2
from service.telemetry import MAX_REQUEST_ID_LENGTH, is_request_id

DTYPES: Mapping[tensor_pb2.Dtype, torch.dtype] = {
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_INT32: torch.int32,
}
_RESPONSE = attention_pb2.AttendResponse
_INDICES: strict.Path = ("pattern", "block_indices", "indices")
_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}

MAX_RANK = 8
# What torch's 64-bit sizes and strides can take.
MAX_TENSOR_BYTES = 2**62

# Views of received bytes are read-only; torch says so at the first one, and nothing here writes to them.
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


@dataclass(frozen=True, slots=True)
class AttendCall:
    """A decoded and validated AttendRequest.

    ``q``, ``k``, ``v`` are the received bytes themselves. ``index_rows`` [heads, rows, slots] int32 are the
    block indices as received, one row for ``query_block_size`` queries; None for dense attention.
    ``cu_seqlens_*`` int32 [num_sequences + 1].
    """

    request_id: str
    problem: Problem
    q: memoryview
    k: memoryview
    v: memoryview
    index_rows: torch.Tensor | None
    query_block_size: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    return_lse: bool
    priority: int


def decode_attend(raw: bytes) -> AttendCall:
    """Everything that can be wrong with a request is found here.

    Raises FsaError with code INVALID_ARGUMENT; its reason is one of CODES or of InputError.
    """
    message, payloads = strict.parse(attention_pb2.AttendRequest, raw)
    if message.request_id and not is_request_id(message.request_id):
        text = f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters without spaces"
        raise FsaError("INVALID_REQUEST_ID", text)
    try:
        return _decode(message, payloads)
    except InputError as error:
        raise FsaError(
            error.reason, str(error), metadata=error.metadata, request_id=message.request_id
        ) from error
    except FsaError as error:
        error.request_id = message.request_id
        raise


def write_inputs(call: AttendCall, memory: memoryview) -> None:
    """Copies the call's tensors to where ``Layout.of(call.problem)`` says, the indices in normal form."""
    layout = Layout.of(call.problem)
    for field, payload in ((layout.q, call.q), (layout.k, call.k), (layout.v, call.v)):
        if field.num_bytes:
            np.copyto(_raw(memory, field), np.frombuffer(payload, np.uint8))
    _tensor(memory, layout.cu_seqlens_q).copy_(call.cu_seqlens_q)
    _tensor(memory, layout.cu_seqlens_k).copy_(call.cu_seqlens_k)
    if call.index_rows is not None:
        _tensor(memory, layout.block_indices).copy_(_normal_form(call, call.index_rows))


@dataclass(frozen=True, slots=True)
class SendClock:
    """When the request began to be decoded, and when its answer was there (time.perf_counter)."""

    started: float
    answered: float


def encode_attend(
    request_id: str,
    call: AttendCall,
    memory: memoryview,
    timings: attention_pb2.Timings,
    clock: SendClock,
) -> bytes:
    """The bytes of the AttendResponse, the answer copied out of ``memory`` once.

    Fills in ``send`` and ``total`` of ``timings``, which come last on the wire so that they can tell of
    that copy.
    """
    layout = Layout.of(call.problem)
    parts: list[wire.Buffer] = [attention_pb2.AttendResponse(request_id=request_id).SerializeToString()]
    parts += wire.length_delimited(_RESPONSE.OUT_FIELD_NUMBER, _tensor_parts(layout.out, memory))
    if call.return_lse:
        parts += wire.length_delimited(_RESPONSE.LSE_FIELD_NUMBER, _tensor_parts(layout.lse, memory))
    # Any value but 0 takes the same eight bytes, so the size is known before the time is.
    timings.send = timings.total = 1.0
    tail_bytes = attention_pb2.AttendResponse(timings=timings).ByteSize()
    # Written in place and handed on as it is: joining would copy the answer again to append the timings.
    buffer = io.BytesIO(bytes(sum(map(len, parts)) + tail_bytes))
    with buffer.getbuffer() as whole:
        _copy_parts(parts, whole)
        now = time.perf_counter()
        timings.send, timings.total = now - clock.answered, now - clock.started
        whole[-tail_bytes:] = attention_pb2.AttendResponse(timings=timings).SerializeToString()
    return buffer.getvalue()


def _decode(message: attention_pb2.AttendRequest, payloads: Mapping[strict.Path, memoryview]) -> AttendCall:
    q, k, v = (_tensor_field(name, message, (name,), payloads) for name in ("q", "k", "v"))
    cu_seqlens_q, cu_seqlens_k = _starts(message.cu_seqlens_q), _starts(message.cu_seqlens_k)
    rest: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "softmax_scale": message.softmax_scale if message.HasField("softmax_scale") else None,
        "causal": message.causal,
    }
    index_rows, query_block_size = None, 1
    match message.pattern.WhichOneof("kind"):
        case "dense":
            problem = validate_dense(q, k, v, **rest)
        case "block_indices":
            pattern = message.pattern.block_indices
            query_block_size = pattern.query_block_size or 1
            index_rows = _tensor_field("block_indices", pattern, _INDICES, payloads)
            problem = validate_selected(
                q,
                k,
                v,
                index_rows,
                block_size=pattern.block_size,
                query_block_size=query_block_size,
                **rest,
            )
        case _:
            raise _missing("pattern")
    return AttendCall(
        request_id=message.request_id,
        problem=problem,
        q=payloads["q", "inline"],
        k=payloads["k", "inline"],
        v=payloads["v", "inline"],
        index_rows=index_rows,
        query_block_size=query_block_size,
        cu_seqlens_q=_or_one_sequence(cu_seqlens_q, problem.num_q_tokens),
        cu_seqlens_k=_or_one_sequence(cu_seqlens_k, problem.num_k_tokens),
        return_lse=message.return_lse,
        priority=message.priority,
    )


def _tensor_field(
    label: str, parent: Any, path: strict.Path, payloads: Mapping[strict.Path, memoryview]
) -> torch.Tensor:
    """The tensor at ``path`` of the message, the last name of it in ``parent``: a view of its payload."""
    if not parent.HasField(path[-1]):
        raise _missing(label)
    header: tensor_pb2.Tensor = getattr(parent, path[-1])
    if header.WhichOneof("payload") != "inline":
        raise _missing(f"{label}.inline")
    dtype = DTYPES.get(header.dtype)
    if dtype is None:
        known = ", ".join(tensor_pb2.Dtype.Name(number) for number in DTYPES)
        text = f"{label}.dtype is {header.dtype}; it must be one of {known}"
        raise FsaError("INVALID_DTYPE", text, metadata={"field": label, "dtype": str(header.dtype)})
    return _view(label, payloads[*path, "inline"], header.shape, dtype)


def _view(label: str, payload: memoryview, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """``payload`` as a tensor; Python's integers make every check safe from overflow."""
    if len(sizes) > MAX_RANK:
        raise _bad_shape(label, f"{label} has {len(sizes)} dimensions; at most {MAX_RANK} are possible")
    shape = tuple(sizes)
    if any(size < 0 for size in shape):
        raise _bad_shape(label, f"{label} has shape {list(shape)}; no size may be negative")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise _bad_shape(label, f"{label} has shape {list(shape)}, which no memory could hold")
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise FsaError(
            "INVALID_BYTE_COUNT",
            f"{label} of shape {list(shape)} and {str(dtype).removeprefix('torch.')} must have {expected} "
            f"bytes, not {len(payload)}",
            metadata={"field": label, "num_bytes": str(len(payload)), "expected_bytes": str(expected)},
        )
    if not expected:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(payload, dtype=torch.uint8)
    # Protobuf puts a payload at any address. Indices are about to be read, element by element; of q, k
    # and v validation sees sizes only, and bytes are copied from anywhere.
    if dtype is torch.int32 and raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def _starts(values: Sequence[int]) -> torch.Tensor | None:
    return torch.tensor(values, dtype=torch.int32) if values else None


def _or_one_sequence(cu_seqlens: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    return single_sequence(num_tokens, torch.device("cpu")) if cu_seqlens is None else cu_seqlens


def _normal_form(call: AttendCall, index_rows: torch.Tensor) -> torch.Tensor:
    """int32 [heads, q tokens, slots]: one row a query token."""
    if call.query_block_size == 1:
        return index_rows
    return expand_query_blocks(
        index_rows,
        query_block_size=call.query_block_size,
        block_size=call.problem.block_size,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        causal=call.problem.causal,
    )


def _raw(memory: memoryview, field: Field) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(memory, np.uint8, field.num_bytes, field.offset)


def _tensor(memory: memoryview, field: Field) -> torch.Tensor:
    if not field.num_bytes:
        return torch.empty(field.shape, dtype=field.dtype)
    return torch.frombuffer(memory[field.offset :][: field.num_bytes], dtype=field.dtype).view(field.shape)


def _tensor_parts(field: Field, memory: memoryview) -> list[wire.Buffer]:
    header = tensor_pb2.Tensor(dtype=_NUMBERS[field.dtype], shape=field.shape)
    payload = memory[field.offset :][: field.num_bytes]
    return [
        header.SerializeToString(),
        *wire.length_delimited(tensor_pb2.Tensor.INLINE_FIELD_NUMBER, [payload]),
    ]


def _copy_parts(parts: Sequence[wire.Buffer], target: memoryview) -> None:
    position = 0
    for part in parts:
        if len(part):
            # Unlike a slice assignment, this lets other threads run while it copies.
            np.copyto(np.frombuffer(target, np.uint8, len(part), position), np.frombuffer(part, np.uint8))
        position += len(part)


def _missing(label: str) -> FsaError:
    return FsaError("MISSING_FIELD", f"{label} is missing", metadata={"field": label})


def _bad_shape(label: str, text: str) -> FsaError:
    return FsaError("INVALID_SHAPE", text, metadata={"field": label})

"""Requests to bytes and bytes to answers, the same for both clients.

Payloads are framed by hand (service.wire), so that a request's tensors are copied once on their way
into the message and an answer's once on their way out.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckResponse

from service import wire
from service.client.arrays import FLOATING, INDEX, MASK, ArrayT, WireTensor, from_wire, to_wire
from service.client.patterns import BlockCsr, BlockIndices, BlockMask, Dense, Pattern, Select, VerticalSlash
from service.client.results import AttendResult, Device, Limits, PatternLimits, ServerInfo, Timings
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

M = TypeVar("M", bound=Message)

_REQUEST = attention_pb2.AttendRequest
_RESPONSE = attention_pb2.AttendResponse
_PATTERN = pattern_pb2.SparsityPattern
_RESPONSE_TENSORS = {
    _RESPONSE.OUT_FIELD_NUMBER,
    _RESPONSE.LSE_FIELD_NUMBER,
    _RESPONSE.BLOCK_INDICES_FIELD_NUMBER,
}


class AttendOptions(TypedDict, total=False):
    """The keyword arguments of ``attend``, which documents them."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    softmax_scale: float | None
    causal: bool
    return_lse: bool
    request_id: str | None
    priority: int
    timeout_seconds: float | None


@dataclass(frozen=True, slots=True)
class AttendCall(Generic[ArrayT]):
    """One Attend call: its bytes, the id it goes by, and the array whose kind its answer takes."""

    payload: bytes
    request_id: str
    like: ArrayT

    @classmethod
    def of(
        cls,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        pattern: Pattern,
        *,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        softmax_scale: float | None,
        causal: bool,
        return_lse: bool,
        request_id: str | None,
        priority: int,
    ) -> "AttendCall[ArrayT]":
        """Encodes the call. TypeError or ValueError for what cannot be; the server judges the rest."""
        request_id = request_id or uuid.uuid4().hex
        head = _message(_REQUEST, request_id=request_id)
        tail = _message(
            _REQUEST,
            cu_seqlens_q=_integers("cu_seqlens_q", cu_seqlens_q),
            cu_seqlens_k=_integers("cu_seqlens_k", cu_seqlens_k),
            softmax_scale=softmax_scale,
            causal=causal,
            return_lse=return_lse,
            priority=priority,
        )
        parts: list[wire.Buffer] = [
            head.SerializeToString(),
            *wire.length_delimited(_REQUEST.Q_FIELD_NUMBER, _tensor(to_wire("q", q, FLOATING))),
            *wire.length_delimited(_REQUEST.K_FIELD_NUMBER, _tensor(to_wire("k", k, FLOATING))),
            *wire.length_delimited(_REQUEST.V_FIELD_NUMBER, _tensor(to_wire("v", v, FLOATING))),
            *wire.length_delimited(_REQUEST.PATTERN_FIELD_NUMBER, _pattern(pattern)),
            tail.SerializeToString(),
        ]
        return cls(b"".join(parts), request_id, q)

    def result(self, reply: bytes) -> AttendResult[ArrayT]:
        """The answer in arrays of the caller's kind. Raises ValueError when the bytes are not one."""
        tensors: dict[int, WireTensor] = {}
        rest: list[memoryview] = []
        for number, whole, value in wire.fields(memoryview(reply)):
            if number in _RESPONSE_TENSORS:
                tensors[number] = _parse_tensor(value)
            else:
                rest.append(whole)
        response = _RESPONSE.FromString(b"".join(rest))
        lse, block_indices = (
            from_wire(tensors[number], self.like) if number in tensors else None
            for number in (_RESPONSE.LSE_FIELD_NUMBER, _RESPONSE.BLOCK_INDICES_FIELD_NUMBER)
        )
        return AttendResult(
            out=from_wire(tensors[_RESPONSE.OUT_FIELD_NUMBER], self.like),
            lse=lse,
            timings=_timings(response.timings),
            request_id=response.request_id,
            block_indices=block_indices,
        )


def parse_server_info(reply: bytes) -> ServerInfo:
    """A GetServerInfoResponse as the caller sees it."""
    message = attention_pb2.GetServerInfoResponse.FromString(reply)
    limits = {name: getattr(message.limits, name) for name in Limits.__slots__ if name != "block_sizes"}
    return ServerInfo(
        version=message.version,
        protocol=message.protocol,
        devices=tuple(
            Device(**{name: getattr(device, name) for name in Device.__slots__}) for device in message.devices
        ),
        dtypes=tuple(tensor_pb2.Dtype.Name(dtype).removeprefix("DTYPE_").lower() for dtype in message.dtypes),
        patterns=tuple(message.patterns),
        kernels=tuple(message.kernels),
        limits=Limits(**limits, block_sizes=tuple(message.limits.block_sizes)),
        versions=dict(message.versions),
        pattern_limits=tuple(
            PatternLimits(**{name: getattr(limits, name) for name in PatternLimits.__slots__})
            for limits in message.pattern_limits
        ),
    )


def parse_health(reply: bytes) -> str:
    """A HealthCheckResponse's status: "SERVING" or "NOT_SERVING"."""
    status = HealthCheckResponse.FromString(reply).status
    return str(HealthCheckResponse.ServingStatus.Name(status))


def _message(kind: type[M], **fields: Any) -> M:
    """``kind`` with what is given of ``fields``. TypeError or ValueError names the one that cannot be."""
    message = kind()
    for name, value in fields.items():
        try:
            if isinstance(value, list | tuple):
                getattr(message, name).extend(value)
            elif value is not None:
                setattr(message, name, value)
        except (TypeError, ValueError) as error:
            shown = f"holds {value[:9]!r}" if isinstance(value, list | tuple) else f"is {value!r}"
            raise type(error)(f"{name} {shown}: {error}") from error
    return message


def _tensor(tensor: WireTensor) -> list[wire.Buffer]:
    header = tensor_pb2.Tensor(dtype=tensor.dtype, shape=tensor.shape)
    payload = wire.length_delimited(tensor_pb2.Tensor.INLINE_FIELD_NUMBER, [tensor.data])
    return [header.SerializeToString(), *payload]


def _parse_tensor(message: memoryview) -> WireTensor:
    header: list[memoryview] = []
    data = memoryview(b"")
    for number, whole, value in wire.fields(message):
        if number == tensor_pb2.Tensor.INLINE_FIELD_NUMBER:
            data = value
        else:
            header.append(whole)
    tensor = tensor_pb2.Tensor.FromString(b"".join(header))
    return WireTensor(tensor.dtype, tuple(tensor.shape), data)


def _pattern(pattern: Pattern) -> list[wire.Buffer]:
    match pattern:
        case Dense():
            return [_PATTERN(dense=pattern_pb2.Dense()).SerializeToString()]
        case BlockIndices():
            indices = _message(
                pattern_pb2.BlockIndices,
                block_size=pattern.block_size,
                query_block_size=pattern.query_block_size,
            )
            tensors = {"indices": to_wire("block_indices", pattern.indices, INDEX)}
            return _variant(_PATTERN.BLOCK_INDICES_FIELD_NUMBER, indices, tensors)
        case BlockCsr():
            csr = _message(
                pattern_pb2.BlockCsr, block_size=pattern.block_size, query_block_size=pattern.query_block_size
            )
            tensors = {name: to_wire(name, getattr(pattern, name), INDEX) for name in ("offsets", "indices")}
            return _variant(_PATTERN.BLOCK_CSR_FIELD_NUMBER, csr, tensors)
        case BlockMask():
            mask = _message(
                pattern_pb2.BlockMask,
                block_size=pattern.block_size,
                query_block_size=pattern.query_block_size,
            )
            tensors = {"mask": to_wire("mask", pattern.mask, MASK)}
            return _variant(_PATTERN.BLOCK_MASK_FIELD_NUMBER, mask, tensors)
        case VerticalSlash():
            lines = _message(pattern_pb2.VerticalSlash, block_size=pattern.block_size)
            tensors = {name: to_wire(name, getattr(pattern, name), INDEX) for name in ("vertical", "slash")}
            return _variant(_PATTERN.VERTICAL_SLASH_FIELD_NUMBER, lines, tensors)
        case Select():
            return _variant(_PATTERN.SELECT_FIELD_NUMBER, *_select(pattern))
    kinds = "BlockIndices, BlockCsr, BlockMask, VerticalSlash, Dense or Select"
    raise TypeError(f"pattern must be {kinds}, not {type(pattern).__name__}")


def _select(pattern: Select) -> tuple[Message, Mapping[str, WireTensor]]:
    select = _message(
        pattern_pb2.Select,
        kernel_size=pattern.kernel_size,
        stride=pattern.stride,
        block_size=pattern.block_size,
        top_k=pattern.top_k,
        num_first_blocks=pattern.num_first_blocks,
        num_local_blocks=pattern.num_local_blocks,
        top_p=pattern.top_p,
        min_share=pattern.min_share,
        window=0 if pattern.gates is None else pattern.window,
        return_block_indices=pattern.return_block_indices,
    )
    return select, {} if pattern.gates is None else {"gates": to_wire("gates", pattern.gates, FLOATING)}


def _variant(number: int, sizes: Message, tensors: Mapping[str, WireTensor]) -> list[wire.Buffer]:
    """Field ``number`` of SparsityPattern: ``sizes`` is the variant without its tensors."""
    parts: list[wire.Buffer] = []
    for name, tensor in tensors.items():
        parts += wire.length_delimited(sizes.DESCRIPTOR.fields_by_name[name].number, _tensor(tensor))
    return wire.length_delimited(number, [*parts, sizes.SerializeToString()])


def _integers(name: str, values: Any) -> Iterable[int]:
    """Sequence starts from a list, an array or a tensor; None is one sequence."""
    if values is None:
        return ()
    values = values.tolist() if hasattr(values, "tolist") else values
    values = list(values) if isinstance(values, range) else values
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a sequence of integers, not {type(values).__name__}")
    return values


def _timings(message: attention_pb2.Timings) -> Timings:
    return Timings(
        receive_seconds=message.receive,
        queue_seconds=message.queue,
        h2d_seconds=message.h2d,
        kernel_seconds=message.kernel,
        d2h_seconds=message.d2h,
        send_seconds=message.send,
        total_seconds=message.total,
        batch_requests=message.batch_requests,
        batch_tokens=message.batch_tokens,
    )

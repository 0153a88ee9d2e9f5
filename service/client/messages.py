"""Requests to bytes and bytes to answers, the same for both clients.

Payloads are framed by hand (service.wire), so that a request's tensors are copied once on their way
into the message and an answer's once on their way out.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypedDict

from grpc_health.v1.health_pb2 import HealthCheckResponse

from service import wire
from service.client.arrays import FLOATING, INDEX, ArrayT, WireTensor, from_wire, to_wire
from service.client.patterns import BlockIndices, Dense, Pattern
from service.client.results import AttendResult, Device, Limits, ServerInfo, Timings
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

_REQUEST = attention_pb2.AttendRequest
_RESPONSE = attention_pb2.AttendResponse


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
        head = _REQUEST(request_id=request_id)
        tail = _REQUEST(
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
            if number in (_RESPONSE.OUT_FIELD_NUMBER, _RESPONSE.LSE_FIELD_NUMBER):
                tensors[number] = _parse_tensor(value)
            else:
                rest.append(whole)
        response = _RESPONSE.FromString(b"".join(rest))
        lse = tensors.get(_RESPONSE.LSE_FIELD_NUMBER)
        return AttendResult(
            out=from_wire(tensors[_RESPONSE.OUT_FIELD_NUMBER], self.like),
            lse=None if lse is None else from_wire(lse, self.like),
            timings=_timings(response.timings),
            request_id=response.request_id,
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
    )


def parse_health(reply: bytes) -> str:
    """A HealthCheckResponse's status: "SERVING" or "NOT_SERVING"."""
    status = HealthCheckResponse.FromString(reply).status
    return str(HealthCheckResponse.ServingStatus.Name(status))


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
    if isinstance(pattern, Dense):
        return [pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense()).SerializeToString()]
    if not isinstance(pattern, BlockIndices):
        raise TypeError(f"pattern must be BlockIndices or Dense, not {type(pattern).__name__}")
    indices = _tensor(to_wire("block_indices", pattern.indices, INDEX))
    sizes = pattern_pb2.BlockIndices(block_size=pattern.block_size, query_block_size=pattern.query_block_size)
    return wire.length_delimited(
        pattern_pb2.SparsityPattern.BLOCK_INDICES_FIELD_NUMBER,
        [
            *wire.length_delimited(pattern_pb2.BlockIndices.INDICES_FIELD_NUMBER, indices),
            sizes.SerializeToString(),
        ],
    )


def _integers(name: str, values: Any) -> Iterable[int]:
    """Sequence starts from a list, an array or a tensor; None is one sequence."""
    if values is None:
        return ()
    values = values.tolist() if hasattr(values, "tolist") else values
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

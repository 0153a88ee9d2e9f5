"""Wire bytes to a validated call and back, each payload copied once: into the arena, and out of it."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fsa_core.packing import single_sequence
from fsa_core.problem import Problem
from fsa_core.validation import InputError
from service import selection, strict, tensors, wire
from service.errors import FsaError
from service.job import Field, Layout
from service.pb.fsa.v1 import attention_pb2, tensor_pb2
from service.telemetry import MAX_REQUEST_ID_LENGTH, is_request_id

_RESPONSE = attention_pb2.AttendResponse
_NUMBERS = {dtype: number for number, dtype in tensors.DTYPES.items()}


@dataclass(frozen=True, slots=True)
class AttendCall:
    """A decoded and validated AttendRequest.

    ``q``, ``k``, ``v`` are the received bytes themselves, and so are the tensors of ``pattern``, which is
    None for dense attention. ``cu_seqlens_*`` int32 [num_sequences + 1].
    """

    request_id: str
    problem: Problem
    q: memoryview
    k: memoryview
    v: memoryview
    pattern: selection.Pattern | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    return_lse: bool
    priority: int

    @property
    def returns_block_indices(self) -> bool:
        return isinstance(self.pattern, selection.Select) and self.pattern.return_block_indices

    @property
    def answer_bytes(self) -> int:
        """Of the tensors that are asked for."""
        layout = Layout.of(self.problem)
        asked = [layout.out]
        if self.return_lse:
            asked.append(layout.lse)
        if self.returns_block_indices:
            asked.append(layout.block_indices)
        return sum(field.num_bytes for field in asked)


@dataclass(frozen=True, slots=True)
class DeclaredSizes:
    """What a request says of its size, before anything of it is checked: no tensor need hold so much."""

    num_q_tokens: int
    num_k_tokens: int
    num_sequences: int
    num_q_heads: int


def decode_attend(raw: bytes, check_sizes: Callable[[DeclaredSizes], None] = lambda _: None) -> AttendCall:
    """Everything that can be wrong with a request is found here.

    ``check_sizes`` raises what is to be raised of sizes that would take long to look at.

    Raises FsaError with code INVALID_ARGUMENT; its reason is one of CODES or of InputError.
    """
    message, payloads = strict.parse(attention_pb2.AttendRequest, raw)
    if message.request_id and not is_request_id(message.request_id):
        text = f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters without spaces"
        raise FsaError("INVALID_REQUEST_ID", text)
    try:
        return _decode(message, payloads, check_sizes)
    except InputError as error:
        raise FsaError(
            error.reason, str(error), metadata=error.metadata, request_id=message.request_id
        ) from error
    except FsaError as error:
        error.request_id = message.request_id
        raise


def write_inputs(call: AttendCall, memory: memoryview) -> None:
    """Copies the call's tensors to where ``Layout.of(call.problem)`` says, block indices in normal form."""
    layout = Layout.of(call.problem)
    for field, payload in ((layout.q, call.q), (layout.k, call.k), (layout.v, call.v)):
        if field.num_bytes:
            np.copyto(_raw(memory, field), np.frombuffer(payload, np.uint8))
    _tensor(memory, layout.cu_seqlens_q).copy_(call.cu_seqlens_q)
    _tensor(memory, layout.cu_seqlens_k).copy_(call.cu_seqlens_k)
    if isinstance(call.pattern, selection.Select):
        if call.pattern.gates is not None:
            _tensor(memory, layout.gates).copy_(call.pattern.gates)
    elif call.pattern is not None:
        block_indices = _tensor(memory, layout.block_indices)
        starts = (call.cu_seqlens_q, call.cu_seqlens_k)
        selection.write(call.pattern, block_indices, *starts, causal=call.problem.causal)


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
    if call.returns_block_indices:
        chosen = _tensor_parts(layout.block_indices, memory)
        parts += wire.length_delimited(_RESPONSE.BLOCK_INDICES_FIELD_NUMBER, chosen)
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


def _decode(
    message: attention_pb2.AttendRequest,
    payloads: Mapping[strict.Path, memoryview],
    check_sizes: Callable[[DeclaredSizes], None],
) -> AttendCall:
    q, k, v = (tensors.read(name, message, (name,), payloads) for name in ("q", "k", "v"))
    num_starts = max(len(message.cu_seqlens_q), len(message.cu_seqlens_k))
    # Without tokens a tensor may have any number of heads, and a pattern of as many is no byte.
    check_sizes(DeclaredSizes(_size(q, 0), _size(k, 0), max(num_starts - 1, 0), _size(q, 1)))
    cu_seqlens_q, cu_seqlens_k = _starts(message.cu_seqlens_q), _starts(message.cu_seqlens_k)
    pattern = selection.read(message.pattern, payloads)
    problem = selection.validate(
        pattern,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=message.softmax_scale if message.HasField("softmax_scale") else None,
        causal=message.causal,
    )
    if message.return_lse and isinstance(pattern, selection.Select) and pattern.gates is not None:
        text = "return_lse with gates: a gated sum has no log-sum-exp"
        raise FsaError("INVALID_GATES", text, metadata={"field": "return_lse", "expected": "false"})
    return AttendCall(
        request_id=message.request_id,
        problem=problem,
        q=payloads["q", "inline"],
        k=payloads["k", "inline"],
        v=payloads["v", "inline"],
        pattern=pattern,
        cu_seqlens_q=_or_one_sequence(cu_seqlens_q, problem.num_q_tokens),
        cu_seqlens_k=_or_one_sequence(cu_seqlens_k, problem.num_k_tokens),
        return_lse=message.return_lse,
        priority=message.priority,
    )


def _size(x: torch.Tensor, dim: int) -> int:
    """0 where x is no [tokens, heads, dim], which is refused as such."""
    return x.shape[dim] if x.dim() == 3 else 0


def _starts(values: Sequence[int]) -> torch.Tensor | None:
    return torch.tensor(values, dtype=torch.int32) if values else None


def _or_one_sequence(cu_seqlens: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    return single_sequence(num_tokens, torch.device("cpu")) if cu_seqlens is None else cu_seqlens


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

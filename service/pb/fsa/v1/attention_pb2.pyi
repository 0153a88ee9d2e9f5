from service.pb.fsa.v1 import pattern_pb2 as _pattern_pb2
from service.pb.fsa.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttendRequest(_message.Message):
    __slots__ = ("request_id", "q", "k", "v", "pattern", "cu_seqlens_q", "cu_seqlens_k", "softmax_scale", "causal", "return_lse", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_Q_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_K_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_FIELD_NUMBER: _ClassVar[int]
    RETURN_LSE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    q: _tensor_pb2.Tensor
    k: _tensor_pb2.Tensor
    v: _tensor_pb2.Tensor
    pattern: _pattern_pb2.SparsityPattern
    cu_seqlens_q: _containers.RepeatedScalarFieldContainer[int]
    cu_seqlens_k: _containers.RepeatedScalarFieldContainer[int]
    softmax_scale: float
    causal: bool
    return_lse: bool
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., q: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., k: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., v: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., pattern: _Optional[_Union[_pattern_pb2.SparsityPattern, _Mapping]] = ..., cu_seqlens_q: _Optional[_Iterable[int]] = ..., cu_seqlens_k: _Optional[_Iterable[int]] = ..., softmax_scale: _Optional[float] = ..., causal: bool = ..., return_lse: bool = ..., priority: _Optional[int] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("request_id", "out", "lse", "timings", "block_indices")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    out: _tensor_pb2.Tensor
    lse: _tensor_pb2.Tensor
    timings: Timings
    block_indices: _tensor_pb2.Tensor
    def __init__(self, request_id: _Optional[str] = ..., out: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., lse: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., block_indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue", "receive", "h2d", "kernel", "d2h", "send", "total", "batch_requests", "batch_tokens")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_FIELD_NUMBER: _ClassVar[int]
    H2D_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    D2H_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue: float
    receive: float
    h2d: float
    kernel: float
    d2h: float
    send: float
    total: float
    batch_requests: int
    batch_tokens: int
    def __init__(self, queue: _Optional[float] = ..., receive: _Optional[float] = ..., h2d: _Optional[float] = ..., kernel: _Optional[float] = ..., d2h: _Optional[float] = ..., send: _Optional[float] = ..., total: _Optional[float] = ..., batch_requests: _Optional[int] = ..., batch_tokens: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "protocol", "devices", "dtypes", "patterns", "limits", "kernels", "versions", "pattern_limits")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PATTERN_LIMITS_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    dtypes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Dtype]
    patterns: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    kernels: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.ScalarMap[str, str]
    pattern_limits: _containers.RepeatedCompositeFieldContainer[PatternLimits]
    def __init__(self, version: _Optional[str] = ..., protocol: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., dtypes: _Optional[_Iterable[_Union[_tensor_pb2.Dtype, str]]] = ..., patterns: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., kernels: _Optional[_Iterable[str]] = ..., versions: _Optional[_Mapping[str, str]] = ..., pattern_limits: _Optional[_Iterable[_Union[PatternLimits, _Mapping]]] = ...) -> None: ...

class PatternLimits(_message.Message):
    __slots__ = ("name", "max_slots", "shared_rows", "causal_only", "max_kernel_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    MAX_KERNEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_slots: int
    shared_rows: bool
    causal_only: bool
    max_kernel_size: int
    def __init__(self, name: _Optional[str] = ..., max_slots: _Optional[int] = ..., shared_rows: bool = ..., causal_only: bool = ..., max_kernel_size: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("index", "kind", "name", "memory_bytes", "up")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    index: int
    kind: str
    name: str
    memory_bytes: int
    up: bool
    def __init__(self, index: _Optional[int] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., up: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_inflight_bytes", "max_inflight_requests", "max_tokens", "max_sequences", "max_q_heads", "min_head_dim", "max_head_dim", "block_sizes", "max_slots", "workspace_bytes", "max_batch_requests", "max_batch_tokens", "max_batch_delay_seconds")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    MIN_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZES_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_DELAY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_inflight_bytes: int
    max_inflight_requests: int
    max_tokens: int
    max_sequences: int
    max_q_heads: int
    min_head_dim: int
    max_head_dim: int
    block_sizes: _containers.RepeatedScalarFieldContainer[int]
    max_slots: int
    workspace_bytes: int
    max_batch_requests: int
    max_batch_tokens: int
    max_batch_delay_seconds: float
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_inflight_bytes: _Optional[int] = ..., max_inflight_requests: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_q_heads: _Optional[int] = ..., min_head_dim: _Optional[int] = ..., max_head_dim: _Optional[int] = ..., block_sizes: _Optional[_Iterable[int]] = ..., max_slots: _Optional[int] = ..., workspace_bytes: _Optional[int] = ..., max_batch_requests: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_batch_delay_seconds: _Optional[float] = ...) -> None: ...

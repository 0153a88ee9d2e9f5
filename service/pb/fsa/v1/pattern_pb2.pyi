from service.pb.fsa.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SparsityPattern(_message.Message):
    __slots__ = ("block_indices", "block_csr", "vertical_slash", "select", "dense", "block_mask")
    BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_CSR_FIELD_NUMBER: _ClassVar[int]
    VERTICAL_SLASH_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_MASK_FIELD_NUMBER: _ClassVar[int]
    block_indices: BlockIndices
    block_csr: BlockCsr
    vertical_slash: VerticalSlash
    select: Select
    dense: Dense
    block_mask: BlockMask
    def __init__(self, block_indices: _Optional[_Union[BlockIndices, _Mapping]] = ..., block_csr: _Optional[_Union[BlockCsr, _Mapping]] = ..., vertical_slash: _Optional[_Union[VerticalSlash, _Mapping]] = ..., select: _Optional[_Union[Select, _Mapping]] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ..., block_mask: _Optional[_Union[BlockMask, _Mapping]] = ...) -> None: ...

class BlockIndices(_message.Message):
    __slots__ = ("indices", "block_size", "query_block_size")
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    indices: _tensor_pb2.Tensor
    block_size: int
    query_block_size: int
    def __init__(self, indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., block_size: _Optional[int] = ..., query_block_size: _Optional[int] = ...) -> None: ...

class BlockCsr(_message.Message):
    __slots__ = ("offsets", "indices", "block_size", "query_block_size")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    offsets: _tensor_pb2.Tensor
    indices: _tensor_pb2.Tensor
    block_size: int
    query_block_size: int
    def __init__(self, offsets: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., block_size: _Optional[int] = ..., query_block_size: _Optional[int] = ...) -> None: ...

class BlockMask(_message.Message):
    __slots__ = ("mask", "block_size", "query_block_size")
    MASK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    mask: _tensor_pb2.Tensor
    block_size: int
    query_block_size: int
    def __init__(self, mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., block_size: _Optional[int] = ..., query_block_size: _Optional[int] = ...) -> None: ...

class VerticalSlash(_message.Message):
    __slots__ = ("vertical", "slash", "block_size")
    VERTICAL_FIELD_NUMBER: _ClassVar[int]
    SLASH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    vertical: _tensor_pb2.Tensor
    slash: _tensor_pb2.Tensor
    block_size: int
    def __init__(self, vertical: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., slash: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., block_size: _Optional[int] = ...) -> None: ...

class Select(_message.Message):
    __slots__ = ("kernel_size", "stride", "block_size", "top_k", "num_first_blocks", "num_local_blocks", "top_p", "min_share", "gates", "window", "return_block_indices")
    KERNEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    NUM_FIRST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOCAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_SHARE_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    RETURN_BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    kernel_size: int
    stride: int
    block_size: int
    top_k: int
    num_first_blocks: int
    num_local_blocks: int
    top_p: float
    min_share: float
    gates: _tensor_pb2.Tensor
    window: int
    return_block_indices: bool
    def __init__(self, kernel_size: _Optional[int] = ..., stride: _Optional[int] = ..., block_size: _Optional[int] = ..., top_k: _Optional[int] = ..., num_first_blocks: _Optional[int] = ..., num_local_blocks: _Optional[int] = ..., top_p: _Optional[float] = ..., min_share: _Optional[float] = ..., gates: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., window: _Optional[int] = ..., return_block_indices: bool = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

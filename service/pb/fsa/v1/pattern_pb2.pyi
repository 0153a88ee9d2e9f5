from service.pb.fsa.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SparsityPattern(_message.Message):
    __slots__ = ("block_indices", "dense")
    BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    block_indices: BlockIndices
    dense: Dense
    def __init__(self, block_indices: _Optional[_Union[BlockIndices, _Mapping]] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ...) -> None: ...

class BlockIndices(_message.Message):
    __slots__ = ("indices", "block_size", "query_block_size")
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    indices: _tensor_pb2.Tensor
    block_size: int
    query_block_size: int
    def __init__(self, indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., block_size: _Optional[int] = ..., query_block_size: _Optional[int] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

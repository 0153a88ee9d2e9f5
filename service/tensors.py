"""Tensors of the wire as views of the bytes that were received."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from service import strict
from service.errors import FsaError
from service.pb.fsa.v1 import tensor_pb2

DTYPES: Mapping[tensor_pb2.Dtype, torch.dtype] = {
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_INT32: torch.int32,
    tensor_pb2.DTYPE_BOOL: torch.bool,
}

MAX_RANK = 8
# Well within what torch's 64-bit sizes and strides can take.
MAX_TENSOR_BYTES = 2**61

# Views of received bytes are read-only; torch says so at the first one, and nothing here writes to them.
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


def read(
    label: str, parent: Any, path: strict.Path, payloads: Mapping[strict.Path, memoryview]
) -> torch.Tensor:
    """The tensor at ``path`` of the message, the last name of it in ``parent``: a view of its payload."""
    if not parent.HasField(path[-1]):
        raise missing(label)
    header: tensor_pb2.Tensor = getattr(parent, path[-1])
    if header.WhichOneof("payload") != "inline":
        raise missing(f"{label}.inline")
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


def missing(label: str) -> FsaError:
    return FsaError("MISSING_FIELD", f"{label} is missing", metadata={"field": label})


def _bad_shape(label: str, text: str) -> FsaError:
    return FsaError("INVALID_SHAPE", text, metadata={"field": label})

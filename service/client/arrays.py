"""Arrays of the caller, numpy's or torch's, as the dtype, shape and bytes that travel, and back.

torch is looked up among the modules already loaded, never imported: a caller who passes a torch
tensor has it, and one who does not needs no torch.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ml_dtypes
import numpy as np

from service.pb.fsa.v1 import tensor_pb2

ArrayT = TypeVar("ArrayT")
"""A numpy array or a torch tensor; what goes in decides what comes out."""

FLOATING = ("float16", "bfloat16", "float32")
INDEX = ("int32",)
MASK = ("bool",)

_NUMPY_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
    "bool": np.dtype("?"),
}
_WIRE_DTYPES = {
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "int32": tensor_pb2.DTYPE_INT32,
    "bool": tensor_pb2.DTYPE_BOOL,
}
_NAMES = {wire: name for name, wire in _WIRE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A dense row-major tensor as it travels: little-endian ``data`` of product(shape) elements."""

    dtype: tensor_pb2.Dtype
    shape: tuple[int, ...]
    data: memoryview


def to_wire(name: str, array: object, dtypes: Collection[str]) -> WireTensor:
    """The tensor as it travels; copies only what is not yet contiguous, little-endian host memory.

    ``name`` is what an error calls it. Raises TypeError when it is neither a numpy array nor a torch
    tensor, or when its dtype is not among ``dtypes``.
    """
    if _is_torch(array):
        dtype = str(cast(Any, array).dtype).removeprefix("torch.")
        convert = _torch_bytes
    elif isinstance(array, np.ndarray):
        dtype = array.dtype.name
        convert = _numpy_bytes
    else:
        raise TypeError(f"{name} must be a numpy array or a torch tensor, not {type(array).__name__}")
    if dtype not in dtypes:
        raise TypeError(f"{name} is {dtype}; the service takes {' or '.join(dtypes)}")
    return WireTensor(_WIRE_DTYPES[dtype], tuple(cast(Any, array).shape), convert(array))


def from_wire(tensor: WireTensor, like: ArrayT) -> ArrayT:
    """The tensor in memory of its own, writable: numpy if ``like`` is, else torch on its device.

    The copy is what aligns the elements: inside a message they start at any byte.
    """
    dtype = _NUMPY_DTYPES[_NAMES[tensor.dtype]]
    array = np.frombuffer(tensor.data, dtype).reshape(tensor.shape).copy()
    if not _is_torch(like):
        return cast(ArrayT, array)
    torch = sys.modules["torch"]
    if dtype == ml_dtypes.bfloat16:  # torch takes numpy's own dtypes only
        answer = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        answer = torch.from_numpy(array)
    return cast(ArrayT, answer.to(cast(Any, like).device))


def _is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _torch_bytes(array: Any) -> memoryview:
    flat = array.detach().contiguous().cpu().reshape(-1)
    return memoryview(flat.view(sys.modules["torch"].uint8).numpy())


def _numpy_bytes(array: Any) -> memoryview:
    array = np.ascontiguousarray(array, dtype=_NUMPY_DTYPES[array.dtype.name])
    return memoryview(array.reshape(-1).view(np.uint8))

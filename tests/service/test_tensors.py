import pytest

from service import tensors
from service.errors import FsaError
from service.pb.fsa.v1 import pattern_pb2, tensor_pb2


@pytest.mark.parametrize("dtype", [tensor_pb2.DTYPE_BOOL, tensor_pb2.DTYPE_INT32])
@pytest.mark.parametrize("shape", [[2**62], [1, 0, 2**62], [2**31, 2**31]])
def test_a_shape_that_no_memory_could_hold_is_refused_as_such(dtype: int, shape: list[int]) -> None:
    mask = tensor_pb2.Tensor(dtype=dtype, shape=shape, inline=b"\0")
    path = ("pattern", "block_mask", "mask")
    with pytest.raises(FsaError) as caught:
        tensors.read("mask", pattern_pb2.BlockMask(mask=mask), path, {(*path, "inline"): memoryview(b"\0")})
    assert caught.value.reason == "INVALID_SHAPE"

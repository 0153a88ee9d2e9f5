"""The request that a fresh worker must answer before clients' requests reach it."""

import time

import torch

from service import codec
from service.arena import ArenaPool
from service.device_worker import RunJob
from service.job import Job, Layout
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

_TOKENS, _Q_HEADS, _KV_HEADS, _DIM, _BLOCK = 64, 4, 2, 64, 16


class WarmUp:
    """Decodes, runs and encodes a real request whose answer is known: attention over ones is one.

    Holds memory of its own, so that a full server can still bring a worker back.
    """

    def __init__(self, arena: ArenaPool) -> None:
        self._raw = _request().SerializeToString()
        self._lease = arena.allocate(Layout.of(codec.decode_attend(self._raw).problem).total_bytes)

    async def __call__(self, run: RunJob) -> None:
        """Raises RuntimeError when the worker's answer is wrong, and whatever ``run`` raises."""
        clock = codec.SendClock(time.perf_counter(), time.perf_counter())
        call = codec.decode_attend(self._raw)
        memory = self._lease.view()
        codec.write_inputs(call, memory)
        await run(Job(call.problem, self._lease.memory))
        encoded = codec.encode_attend("warm-up", call, memory, attention_pb2.Timings(), clock)
        out = attention_pb2.AttendResponse.FromString(encoded).out
        values = torch.frombuffer(bytearray(out.inline), dtype=torch.float16)
        if not torch.allclose(values.float(), torch.ones(_TOKENS * _Q_HEADS * _DIM), atol=1e-2):
            raise RuntimeError("the worker's answer to the warm-up request is wrong")


def _request() -> attention_pb2.AttendRequest:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(_TOKENS, _Q_HEADS, _DIM, generator=generator)
    k = torch.randn(_TOKENS, _KV_HEADS, _DIM, generator=generator)
    blocks = torch.arange(_TOKENS // _BLOCK, dtype=torch.int32)
    own_block = torch.arange(_TOKENS)[:, None] // _BLOCK
    indices = torch.where(blocks <= own_block, blocks, -1).expand(_KV_HEADS, -1, -1)
    pattern = pattern_pb2.BlockIndices(
        indices=_tensor(indices, torch.int32, tensor_pb2.DTYPE_INT32), block_size=_BLOCK
    )
    return attention_pb2.AttendRequest(
        request_id="warm-up",
        q=_tensor(q, torch.float16, tensor_pb2.DTYPE_FLOAT16),
        k=_tensor(k, torch.float16, tensor_pb2.DTYPE_FLOAT16),
        v=_tensor(torch.ones_like(k), torch.float16, tensor_pb2.DTYPE_FLOAT16),
        pattern=pattern_pb2.SparsityPattern(block_indices=pattern),
        causal=True,
    )


def _tensor(values: torch.Tensor, dtype: torch.dtype, number: tensor_pb2.Dtype) -> tensor_pb2.Tensor:
    contiguous = values.to(dtype).contiguous()
    return tensor_pb2.Tensor(dtype=number, shape=values.shape, inline=contiguous.numpy().tobytes())

"""What a request and an answer cost the client, beside protobuf's own classes.

Run: ``python benchmarks/client_encoding.py``, on Linux. Each case runs in a process of its own, so that its
peak memory is its own.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from service.client import Dense
from service.client.messages import AttendCall
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

MIB = 1 << 20
PAYLOAD_BYTES = 64 * MIB
REPEATS = 5


def main() -> None:
    for name in CASES:
        subprocess.run([sys.executable, __file__, name], check=True)


def measure(name: str) -> None:
    """Prints the median time of a case, and how far it raised the peak memory of this process."""
    run = CASES[name]()
    before = _memory_mib("VmRSS")
    _reset_peak()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = _memory_mib("VmHWM") - before
    print(f"{name:18} {sorted(seconds)[REPEATS // 2] * 1e3:6.0f} ms {peak:5} MiB")


def tensors() -> tuple[np.ndarray, np.ndarray]:
    """q, and a k half as large that is v as well: together the payload."""
    elements = PAYLOAD_BYTES // 2
    q = np.ones(elements // 2, ml_dtypes.bfloat16).reshape(-1, 16, 64)
    return q, np.ones((len(q) // 2, 16, 64), ml_dtypes.bfloat16)


def request_protobuf() -> Callable[[], object]:
    q, k = tensors()

    def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BFLOAT16, shape=array.shape, inline=array.tobytes())

    def run() -> object:
        request = attention_pb2.AttendRequest(
            request_id="id",
            q=tensor(q),
            k=tensor(k),
            v=tensor(k),
            pattern=pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense()),
        )
        return request.SerializeToString()

    return run


def request_client() -> Callable[[], object]:
    q, k = tensors()
    return lambda: _call(q, k)


def answer_protobuf() -> Callable[[], object]:
    reply = _reply()

    def run() -> object:
        return np.frombuffer(attention_pb2.AttendResponse.FromString(reply).out.inline, ml_dtypes.bfloat16)

    return run


def answer_client() -> Callable[[], object]:
    reply = _reply()
    q = np.ones((1, 16, 64), ml_dtypes.bfloat16)
    return lambda: _call(q, q).result(reply)


def _call(q: np.ndarray, k: np.ndarray) -> AttendCall[np.ndarray]:
    return AttendCall.of(
        q,
        k,
        k,
        Dense(),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        softmax_scale=None,
        causal=True,
        return_lse=False,
        request_id="id",
        priority=0,
    )


def _reply() -> bytes:
    shape = (PAYLOAD_BYTES // (2 * 16 * 64), 16, 64)
    out = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BFLOAT16, shape=shape, inline=bytes(PAYLOAD_BYTES))
    return attention_pb2.AttendResponse(out=out).SerializeToString()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def _memory_mib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024


CASES = {
    "request, protobuf": request_protobuf,
    "request, client": request_client,
    "answer, protobuf": answer_protobuf,
    "answer, client": answer_client,
}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        main()

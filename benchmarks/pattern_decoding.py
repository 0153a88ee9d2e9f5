"""What each pattern costs the server's front end, from the received bytes to block indices in the arena.

Run: ``python benchmarks/pattern_decoding.py``. One thread; the best of a few, as the machine may be shared.
"""

import time
from collections.abc import Iterator

import torch

from service import codec
from service.client import BlockCsr, BlockIndices, BlockMask, Dense, VerticalSlash
from service.client.messages import AttendCall
from service.client.patterns import Pattern
from service.job import Layout

TOKENS, HEADS, DIM, BLOCK_SIZE, SLOTS = 65536, 8, 16, 64, 16
REPEATS = 5


def main() -> None:
    torch.set_num_threads(1)
    q = torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float16)
    dense_bytes = len(_request(q, Dense()))
    print(f"{'pattern':34} {'sent':>9} {'decode':>9} {'write':>9}")
    for name, pattern in patterns():
        raw = _request(q, pattern)
        decode_seconds, write_seconds = measure(raw)
        sent = f"{(len(raw) - dense_bytes) / 1e6:.1f} MB"
        print(f"{name:34} {sent:>9} {decode_seconds * 1e3:6.0f} ms {write_seconds * 1e3:6.0f} ms")


def patterns() -> Iterator[tuple[str, Pattern]]:
    """The last 16 blocks of each query or block of queries, said in each way; columns and diagonals."""
    yield "Dense", Dense()
    block = torch.arange(TOKENS // BLOCK_SIZE)
    for query_block_size, own in ((1, block.repeat_interleave(BLOCK_SIZE)), (BLOCK_SIZE, block)):
        ids = _last_blocks(own)
        sizes = (BLOCK_SIZE, query_block_size)
        rows = f"a row for {query_block_size}"
        yield f"BlockIndices, {rows}", BlockIndices(ids, *sizes)
        yield f"BlockCsr, {rows}", BlockCsr(*_csr(ids), *sizes)
    back = block[:, None] - block
    mask = ((back >= 0) & (back < SLOTS)).expand(HEADS, -1, -1)
    yield f"BlockMask, a row for {BLOCK_SIZE}", BlockMask(mask, BLOCK_SIZE, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    vertical, slash = (torch.randint(TOKENS, (HEADS, 8), generator=generator).int() for _ in range(2))
    yield "VerticalSlash, 8 and 8", VerticalSlash(vertical, slash, BLOCK_SIZE)


def measure(raw: bytes) -> tuple[float, float]:
    """Seconds to decode and check the request, and to write its inputs where they belong."""
    memory = memoryview(bytearray(Layout.of(codec.decode_attend(raw).problem).total_bytes))
    decode_seconds, write_seconds = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call = codec.decode_attend(raw)
        decoded = time.perf_counter()
        codec.write_inputs(call, memory)
        decode_seconds.append(decoded - start)
        write_seconds.append(time.perf_counter() - decoded)
    return min(decode_seconds), min(write_seconds)


def _last_blocks(own: torch.Tensor) -> torch.Tensor:
    """int32 [heads, rows, slots] up to each row's ``own`` block, ascending, then -1."""
    ids = (own[:, None] - SLOTS + 1).clamp(min=0) + torch.arange(SLOTS)
    return ids.where(ids <= own[:, None], -1).int().expand(HEADS, -1, -1).contiguous()


def _csr(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.nn.functional.pad((ids >= 0).sum(-1).flatten().cumsum(0), (1, 0)).int()
    return ends.unfold(0, ids.shape[1] + 1, ids.shape[1]), ids[ids >= 0]


def _request(q: torch.Tensor, pattern: Pattern) -> bytes:
    options = {"cu_seqlens_q": None, "cu_seqlens_k": None, "softmax_scale": None, "causal": True}
    return AttendCall.of(q, q, q, pattern, return_lse=False, request_id="id", priority=0, **options).payload


if __name__ == "__main__":
    main()

"""Both clients against a real server: right answers in the caller's arrays, and failures worth catching."""

import asyncio
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch

from fsa_core.api import dense_attention, selected_attention
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import nsa_attention, select_blocks
from service.client import (
    AsyncAttentionClient,
    AttentionClient,
    AttentionError,
    BlockCsr,
    BlockIndices,
    BlockMask,
    DeadlineExceeded,
    Dense,
    InvalidRequest,
    ResourceExhausted,
    Select,
    Unavailable,
    VerticalSlash,
)
from service.client.connection import ATTEND, channel_options
from service.client.retry import CHANNEL_SECONDS
from tests.serving import ServerProcess, eventually, request_of

TOKENS, Q_HEADS, KV_HEADS, DIM, BLOCK_SIZE = 40, 4, 2, 32, 16
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


class Awaited:
    """AsyncAttentionClient with its calls run to their end, so that one test serves both clients."""

    def __init__(self, target: str, **options: Any) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> AsyncAttentionClient:
            return AsyncAttentionClient(target, **options)

        self._client = self._runner.run(connect())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def __enter__(self) -> "Awaited":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[AttentionClient, Awaited], ids=["sync", "async"])
def client_type(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(client_type: Any, server: ServerProcess) -> Iterator[Any]:
    with client_type(server.target, timeout_seconds=30) as client:
        yield client


def torch_tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v, and rows with their own block and, where there is one, the block before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(TOKENS, heads, DIM, generator=generator).to(dtype)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )
    own = torch.arange(TOKENS, dtype=torch.int32) // BLOCK_SIZE
    return q, k, v, torch.stack([own - 1, own], dim=-1)[None].expand(KV_HEADS, -1, -1)


def expected(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, block_indices = torch_tensors(dtype)
    q, k, v = q.float(), k.float(), v.float()
    return selected_attention(q, k, v, block_indices, block_size=BLOCK_SIZE, backend="reference")


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
class TestAnswers:
    def test_torch_in_and_out(self, client: Any, dtype: torch.dtype) -> None:
        q, k, v, block_indices = torch_tensors(dtype)
        answer = client.attend(q, k, v, BlockIndices(block_indices, BLOCK_SIZE), return_lse=True)
        out, lse = expected(dtype)
        assert answer.out.dtype == dtype
        torch.testing.assert_close(
            answer.out.float(), out.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        torch.testing.assert_close(answer.lse, lse.float(), atol=1e-2, rtol=1e-3)

    def test_numpy_in_and_out_has_the_same_bits(self, client: Any, dtype: torch.dtype) -> None:
        q, k, v, block_indices = torch_tensors(dtype)
        as_torch = client.attend(q, k, v, BlockIndices(block_indices, BLOCK_SIZE)).out
        arrays = (to_numpy(tensor) for tensor in (q, k, v))
        as_numpy = client.attend(*arrays, BlockIndices(block_indices.numpy(), BLOCK_SIZE)).out
        assert isinstance(as_numpy, np.ndarray)
        assert as_numpy.dtype == to_numpy(as_torch).dtype
        assert as_numpy.tobytes() == to_numpy(as_torch).tobytes()


def test_selected_attention_takes_the_arguments_of_fsa_core(client: Any) -> None:
    q, k, v, _ = torch_tensors()
    starts = torch.tensor([0, 24, TOKENS], dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "softmax_scale": 0.3, "causal": False}
    rows = torch.zeros(1, 2 + 1, 1, dtype=torch.int32)  # 24 queries and 16 queries, 16 to a row
    blocks = {"block_size": BLOCK_SIZE, "query_block_size": 16}
    answer = client.selected_attention(q, k, v, rows, **blocks, **options)
    out, _ = selected_attention(q, k, v, rows, **blocks, **options, backend="reference")
    torch.testing.assert_close(answer.out, out.float(), atol=1e-5, rtol=1e-5)


def test_the_patterns_of_other_systems_get_the_answer_of_their_block_indices(client: Any) -> None:
    q, k, v, block_indices = torch_tensors()
    rows = block_indices[:1].contiguous()
    expected = client.attend(q, k, v, BlockIndices(rows, BLOCK_SIZE)).out
    counts = (rows >= 0).sum(-1)
    offsets = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).int()
    mask = (rows[..., None] == torch.arange(3)).any(2)
    # A token's own key, and the keys that lie a block back.
    lines = VerticalSlash(torch.tensor([[-1]]).int(), torch.tensor([[0, BLOCK_SIZE]]).int(), BLOCK_SIZE)
    for pattern in (BlockCsr(offsets, rows[rows >= 0], BLOCK_SIZE), BlockMask(mask, BLOCK_SIZE, 1), lines):
        assert torch.equal(client.attend(q, k, v, pattern).out, expected), type(pattern).__name__


def test_dense_attention_and_an_empty_request(client: Any) -> None:
    q, k, v, _ = torch_tensors()
    out, _ = dense_attention(q, k, v, backend="reference")
    torch.testing.assert_close(client.attend(q, k, v, Dense()).out, out.float(), atol=1e-5, rtol=1e-5)
    assert client.attend(q[:0], k[:0], v[:0], Dense()).out.shape == (0, Q_HEADS, DIM)


def test_an_answer_carries_its_request_id_and_where_the_time_went(client: Any) -> None:
    q, k, v, _ = torch_tensors()
    answer = client.attend(q, k, v, Dense(), request_id="mine")
    timings = answer.timings
    assert answer.request_id == "mine"
    assert answer.lse is None
    assert 0 < timings.kernel_seconds <= timings.total_seconds < 30
    assert timings.batch_requests == 1
    assert timings.batch_tokens >= TOKENS


def test_a_bad_index_is_an_invalid_request_that_says_where(client: Any) -> None:
    q, k, v, block_indices = torch_tensors()
    bad = block_indices.clone()
    bad[1, 7, 1] = 99
    with pytest.raises(InvalidRequest) as caught:
        client.attend(q, k, v, BlockIndices(bad, BLOCK_SIZE), request_id="bad-one")
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason
    assert error.reason in str(error)
    assert {"head": "1", "token": "7", "slot": "1"}.items() <= error.metadata.items()
    assert error.request_id == "bad-one"
    assert error.retry_after_seconds is None


def test_more_than_the_server_takes_is_resource_exhausted(client: Any) -> None:
    heads = client.server_info().limits.max_q_heads + 1
    q = np.ones((1, heads, 16), np.float32)
    with pytest.raises(ResourceExhausted) as caught:
        client.attend(q, q, q, Dense())
    assert caught.value.reason == "LIMIT_EXCEEDED"


def test_a_deadline_is_kept_while_the_worker_stands_still(client: Any, server: ServerProcess) -> None:
    q, k, v, _ = torch_tensors()
    start = time.monotonic()
    with server.frozen_worker(), pytest.raises(DeadlineExceeded):
        client.attend(q, k, v, Dense(), timeout_seconds=0.3)
    assert time.monotonic() - start < 3


def test_a_client_that_is_closed_says_so(client_type: Any, server: ServerProcess) -> None:
    with client_type(server.target) as client:
        assert client.health() == "SERVING"
        client.close()
        with pytest.raises(RuntimeError, match=f"the client of {server.target} is closed"):
            client.health()


@pytest.mark.parametrize("request_id", ["with a space", "naïve", "two\nlines", "x" * 100_000])
def test_an_id_that_no_header_can_carry_is_refused_with_the_reason(client: Any, request_id: str) -> None:
    q, k, v, _ = torch_tensors()
    with pytest.raises(InvalidRequest) as caught:
        client.attend(q, k, v, Dense(), request_id=request_id)
    assert caught.value.reason == "INVALID_REQUEST_ID"


def test_closing_the_client_fails_its_calls_and_cancels_no_task(server: ServerProcess) -> None:
    q, k, v, _ = torch_tensors()

    async def close_while_one_waits() -> BaseException:
        client = AsyncAttentionClient(server.target)
        task = asyncio.create_task(client.attend(q, k, v, Dense(), request_id="mine"))
        await asyncio.sleep(0.3)
        await client.close()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        return ended

    async def cancel_and_close() -> None:
        client = AsyncAttentionClient(server.target)
        task = asyncio.create_task(client.attend(q, k, v, Dense()))
        await asyncio.sleep(0.3)
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    with server.frozen_worker():
        ended = asyncio.run(close_while_one_waits())
        asyncio.run(cancel_and_close())
    assert isinstance(ended, AttentionError)
    assert (ended.code, ended.request_id) == (grpc.StatusCode.CANCELLED, "mine")


def test_no_deadline_is_no_deadline_and_no_time_is_refused(client: Any) -> None:
    for timeout_seconds in (math.inf, 1e10):
        assert client.health(timeout_seconds=timeout_seconds) == "SERVING"
        assert client.server_info(timeout_seconds=timeout_seconds).version
    for timeout_seconds in (math.nan, -1.0):
        with pytest.raises(ValueError, match=f"timeout_seconds is {timeout_seconds}: expected seconds"):
            client.health(timeout_seconds=timeout_seconds)


@pytest.mark.parametrize("is_gated", [False, True], ids=["selected", "gated"])
def test_select_chooses_attends_and_says_what_it_chose(client: Any, is_gated: bool) -> None:
    q, k, v, _ = torch_tensors()
    gates = torch.rand(TOKENS, Q_HEADS, 3) if is_gated else None
    sizes = {"kernel_size": 8, "stride": 4, "block_size": BLOCK_SIZE, "top_k": 2, "num_local_blocks": 1}
    selection = Select(**sizes, gates=gates, window=20, return_block_indices=True)
    answer = client.select(q, k, v, selection, return_lse=not is_gated)
    config, compress = NSAConfig(**sizes, window=20), MeanCompression(8, 4)
    chosen = select_blocks(q, compress(k), config=config)
    assert torch.equal(answer.block_indices, chosen)
    if gates is None:
        out, lse = selected_attention(q, k, v, chosen, block_size=BLOCK_SIZE)
        torch.testing.assert_close(answer.lse, lse, atol=1e-5, rtol=1e-5)
    else:
        out = nsa_attention(q, k, v, gates, compress, compress, config=config)
        assert answer.lse is None
    torch.testing.assert_close(answer.out, out, atol=1e-5, rtol=1e-5)
    as_numpy = dataclasses.replace(selection, gates=None if gates is None else gates.numpy())
    again = client.select(*(x.numpy() for x in (q, k, v)), as_numpy)
    assert isinstance(again.block_indices, np.ndarray)
    assert again.out.tobytes() == answer.out.numpy().tobytes()
    assert again.block_indices.tobytes() == answer.block_indices.numpy().tobytes()


def test_select_alone_is_by_the_sizes_of_the_paper(client: Any) -> None:
    q, k, v, _ = torch_tensors()
    answer = client.select(q, k, v)
    assert answer.block_indices is None
    # All of so few keys.
    torch.testing.assert_close(answer.out, dense_attention(q, k, v)[0], atol=1e-5, rtol=1e-5)


def test_the_server_says_what_it_is(client: Any, device: torch.device) -> None:
    info = client.server_info()
    assert {(found.kind, found.up) for found in info.devices} == {(device.type, True)}
    assert set(info.dtypes) >= {"float16", "bfloat16", "float32"}
    assert info.limits.block_sizes == (16, 32, 64, 128, 256)
    assert info.versions["torch"]
    assert [limits.name for limits in info.pattern_limits] == list(info.patterns)
    assert client.health() == "SERVING"


def test_waiting_for_a_server_that_is_not_there_ends_in_time(client_type: Any) -> None:
    start = time.monotonic()
    with client_type("127.0.0.1:1") as client, pytest.raises(Unavailable, match="not reachable"):
        client.wait_ready(timeout_seconds=0.5)
    assert time.monotonic() - start < 3


def test_a_server_that_is_not_there_is_asked_until_the_deadline(client_type: Any) -> None:
    q, k, v, _ = torch_tensors()
    start = time.monotonic()
    with client_type("127.0.0.1:1", timeout_seconds=2.5) as client, pytest.raises(Unavailable) as caught:
        client.attend(q, k, v, Dense())
    # Longer than the channel's own attempts; no pause ends after the deadline.
    assert CHANNEL_SECONDS < time.monotonic() - start < 2.5
    assert caught.value.reason == ""


def test_cancelling_the_task_cancels_the_call_on_the_server(server: ServerProcess) -> None:
    q, k, v, _ = torch_tensors()

    def cancelled() -> float:
        return server.metrics().get(("fsa_requests_total", "CANCELLED", "Attend"), 0)

    async def cancel() -> None:
        async with AsyncAttentionClient(server.target) as client:
            task = asyncio.create_task(client.attend(q, k, v, Dense()))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = cancelled()
    with server.frozen_worker():
        asyncio.run(cancel())
    eventually(lambda: cancelled() == before + 1, what="a cancelled request in the metrics")


class TestLostWorker:
    @pytest.fixture(autouse=True)
    def worker_dies_in_half_a_second(self, server: ServerProcess) -> Iterator[int]:
        """Frozen first, so that it dies with the requests in it."""
        (pid,) = server.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        timer.start()
        yield pid
        timer.join()
        server.wait_for_health()

    def test_its_requests_are_retried_for_as_long_as_no_other_worker_is_there(
        self, worker_dies_in_half_a_second: int, server: ServerProcess
    ) -> None:
        q = np.ones((2048, 2, 64), np.float32)  # more than the 256 KiB that gRPC's own retries would take
        pattern = BlockIndices(np.zeros((1, 2048, 1), np.int32), 64)

        def attend(client_type: Any) -> np.ndarray:
            with client_type(server.target, timeout_seconds=120) as client:
                return client.attend(q, q, q, pattern).out

        before = num_refused(server)
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(attend, client_type) for client_type in (AttentionClient, Awaited)]
            with next_worker_held_back(server, worker_dies_in_half_a_second):
                # gRPC's own retries end after five attempts of each.
                eventually(
                    lambda: num_refused(server) > before + 2 * 5, seconds=60, what="more attempts than gRPC's"
                )
                assert not any(answer.done() for answer in answers)
            for answer in answers:
                np.testing.assert_allclose(answer.result(), q, rtol=1e-3)

    def test_the_channel_itself_makes_five_attempts(
        self, worker_dies_in_half_a_second: int, server: ServerProcess, make_case: Callable[..., Any]
    ) -> None:
        with (
            next_worker_held_back(server, worker_dies_in_half_a_second),
            grpc.insecure_channel(server.target, channel_options(retry=True)) as channel,
        ):
            raw = request_of(make_case()).SerializeToString()
            before = num_refused(server)
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(ATTEND)(raw, timeout=60)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert num_refused(server) == before + 5

    def test_what_is_refused_unread_is_in_the_log_under_its_id(
        self, client_type: Any, worker_dies_in_half_a_second: int, server: ServerProcess
    ) -> None:
        q, k, v, _ = torch_tensors()
        request_id = f"unread-{client_type.__name__}"
        with (
            next_worker_held_back(server, worker_dies_in_half_a_second),
            client_type(server.target, timeout_seconds=60, retry=False) as client,
            pytest.raises(Unavailable) as caught,
        ):
            client.attend(q, k, v, Dense(), request_id=request_id)
        assert caught.value.reason == "NO_WORKER"
        assert f'"request_id": "{request_id}"' in server.log.read_text()

    def test_its_request_is_unavailable_when_retries_are_off(
        self, client_type: Any, server: ServerProcess
    ) -> None:
        q, k, v, _ = torch_tensors()
        with (
            client_type(server.target, timeout_seconds=60, retry=False) as client,
            pytest.raises(Unavailable) as caught,
        ):
            client.attend(q, k, v, Dense())
        assert caught.value.reason == "WORKER_LOST"


def num_refused(server: ServerProcess) -> float:
    return server.metrics().get(("fsa_requests_total", "UNAVAILABLE", "Attend"), 0)


@contextmanager
def next_worker_held_back(server: ServerProcess, pid: int) -> Iterator[None]:
    """Waits until another worker than ``pid`` is started; while inside, it does not get any further."""
    eventually(lambda: server.worker_pids() not in ([], [pid]), what="another worker")
    with server.frozen_worker():
        yield

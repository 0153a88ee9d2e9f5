"""The asyncio client: the same calls as the blocking one, awaited."""

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

import grpc
import grpc.aio

from service.client import connection
from service.client.arrays import ArrayT
from service.client.errors import AttentionError, DeadlineExceeded, Unavailable, error_from_rpc
from service.client.messages import AttendCall, AttendOptions, parse_health, parse_server_info
from service.client.patterns import BlockIndices, Pattern, Select
from service.client.results import AttendResult, ServerInfo
from service.client.retry import Attempts

_Method: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


class AsyncAttentionClient:
    """AttentionClient for asyncio, with its arguments; make it and use it inside one running loop.

    Cancelling the task that awaits a call cancels the call on the server.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = connection.DEFAULT_TIMEOUT_SECONDS,
        retry: bool = True,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target
        self._timeout_seconds = timeout_seconds
        self._retry = retry
        self._is_closed = False
        options = connection.channel_options(retry=retry)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._attend: _Method = self._channel.unary_unary(connection.ATTEND)
        self._server_info: _Method = self._channel.unary_unary(connection.SERVER_INFO)
        self._health: _Method = self._channel.unary_unary(connection.HEALTH)

    async def attend(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        pattern: Pattern,
        *,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        softmax_scale: float | None = None,
        causal: bool = True,
        return_lse: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AttendResult[ArrayT]:
        """softmax(q k^T * softmax_scale) v over the selected keys; see ``AttentionClient.attend``."""
        call = AttendCall.of(
            q,
            k,
            v,
            pattern,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            softmax_scale=softmax_scale,
            causal=causal,
            return_lse=return_lse,
            request_id=request_id,
            priority=priority,
        )
        return call.result(await self._persist(self._attend, call.payload, timeout_seconds, call.request_id))

    async def selected_attention(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        block_indices: ArrayT,
        *,
        block_size: int,
        query_block_size: int = 1,
        **options: Unpack[AttendOptions],
    ) -> AttendResult[ArrayT]:
        """``attend`` over selected KV blocks, with the arguments of ``fsa_core.api.selected_attention``."""
        pattern = BlockIndices(block_indices, block_size, query_block_size)
        return await self.attend(q, k, v, pattern, **options)

    async def select(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        selection: Select | None = None,
        **options: Unpack[AttendOptions],
    ) -> AttendResult[ArrayT]:
        """``attend`` over blocks that the server selects; None: by the sizes of the NSA paper."""
        return await self.attend(q, k, v, selection or Select(), **options)

    async def server_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """What the server is, what it takes, and its limits. Raises AttentionError."""
        return parse_server_info(await self._persist(self._server_info, b"", timeout_seconds))

    async def health(self, *, timeout_seconds: float | None = None) -> str:
        """The server's status by gRPC's health protocol: SERVING or NOT_SERVING. Raises AttentionError."""
        return parse_health(await self._call(self._health, b"", self._timeout(timeout_seconds)))

    async def wait_ready(self, timeout_seconds: float = connection.DEFAULT_TIMEOUT_SECONDS) -> None:
        """Returns once the server is SERVING; raises Unavailable when it is not within the time."""
        deadline = time.monotonic() + timeout_seconds
        status = "not reachable"
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                status = parse_health(await self._call(self._health, b"", left, wait_for_ready=True))
                if status == "SERVING":
                    return
            await asyncio.sleep(connection.READY_POLL_SECONDS)
        raise connection.not_ready(self.target, timeout_seconds, status)

    async def close(self) -> None:
        """Ends the connection; calls in flight fail, and later ones raise RuntimeError."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _persist(
        self, method: _Method, payload: bytes, timeout_seconds: float | None, request_id: str = ""
    ) -> bytes:
        """``_call``, again and again while the server is unavailable and there is time."""
        attempts = Attempts(self._timeout(timeout_seconds), retry=self._retry)
        while True:
            try:
                return await self._call(method, payload, attempts.left_seconds, request_id)
            except Unavailable as error:
                pause_seconds = attempts.pause_after(error)
                if pause_seconds is None:
                    raise
            await asyncio.sleep(pause_seconds)

    async def _call(
        self,
        method: _Method,
        payload: bytes,
        timeout_seconds: float,
        request_id: str = "",
        wait_for_ready: bool = False,
    ) -> bytes:
        if self._is_closed:
            raise RuntimeError(f"the client of {self.target} is closed")
        try:
            return await method(
                payload,
                timeout=connection.deadline(timeout_seconds),
                metadata=connection.metadata(request_id),
                wait_for_ready=wait_for_ready,
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, request_id) from error
        except asyncio.CancelledError:
            # So does gRPC end the calls of a channel that is closed: nobody cancelled the task.
            if not self._is_closed or _is_being_cancelled():
                raise
            code = grpc.StatusCode.CANCELLED
            raise AttentionError(code, "", "the client was closed", request_id=request_id) from None

    def _timeout(self, timeout_seconds: float | None) -> float:
        return connection.checked_timeout(
            self._timeout_seconds if timeout_seconds is None else timeout_seconds
        )


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

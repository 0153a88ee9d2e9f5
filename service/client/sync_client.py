"""The blocking client."""

import contextlib
import time
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

import grpc

from service.client import connection
from service.client.arrays import ArrayT
from service.client.errors import DeadlineExceeded, Unavailable, error_from_rpc
from service.client.messages import AttendCall, AttendOptions, parse_health, parse_server_info
from service.client.patterns import BlockIndices, Pattern, Select
from service.client.results import AttendResult, ServerInfo
from service.client.retry import Attempts

_Method: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"


class AttentionClient:
    """Attention computed by a server; safe to share between threads.

    ``target``: "host:port" or any gRPC target. ``timeout_seconds``: the deadline of a call that names
    none, retries included; infinity is none at all. ``retry``: whether a call that gets UNAVAILABLE is sent
    again, with growing waits between, until its deadline. ``credentials``: of a TLS channel; None connects in
    the clear.
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
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._attend: _Method = self._channel.unary_unary(connection.ATTEND)
        self._server_info: _Method = self._channel.unary_unary(connection.SERVER_INFO)
        self._health: _Method = self._channel.unary_unary(connection.HEALTH)

    def attend(
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
        """softmax(q k^T * softmax_scale) v over the keys that ``pattern`` selects.

        ``q``: [q tokens, q heads, head_dim], ``k``: [k tokens, kv heads, head_dim], ``v``: [k tokens,
        kv heads, value_dim]; numpy (float16, float32, ml_dtypes.bfloat16) or torch on any device.
        ``cu_seqlens_*``: where each packed sequence starts, and the total at the end; None: one
        sequence. ``softmax_scale``: 1/sqrt(head_dim) if None. ``causal``: query i of a sequence sits
        at position k_length - q_length + i and sees no later key. ``request_id``: goes into the
        server's log and into errors; made up if None. ``priority``: larger is served earlier.

        Raises AttentionError, or TypeError or ValueError for arguments that cannot be encoded.
        """
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
        return call.result(self._persist(self._attend, call.payload, timeout_seconds, call.request_id))

    def selected_attention(
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
        """``attend`` over selected KV blocks; arguments as ``fsa_core.api.selected_attention`` names them."""
        return self.attend(q, k, v, BlockIndices(block_indices, block_size, query_block_size), **options)

    def select(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        selection: Select | None = None,
        **options: Unpack[AttendOptions],
    ) -> AttendResult[ArrayT]:
        """``attend`` over blocks that the server selects; None: by the sizes of the NSA paper."""
        return self.attend(q, k, v, selection or Select(), **options)

    def server_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """What the server is, what it takes, and its limits. Raises AttentionError."""
        return parse_server_info(self._persist(self._server_info, b"", timeout_seconds))

    def health(self, *, timeout_seconds: float | None = None) -> str:
        """The server's status by gRPC's health protocol: SERVING or NOT_SERVING. Raises AttentionError."""
        return parse_health(self._call(self._health, b"", self._timeout(timeout_seconds)))

    def wait_ready(self, timeout_seconds: float = connection.DEFAULT_TIMEOUT_SECONDS) -> None:
        """Returns once the server is SERVING; raises Unavailable when it is not within the time."""
        deadline = time.monotonic() + timeout_seconds
        status = "not reachable"
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                status = parse_health(self._call(self._health, b"", left, wait_for_ready=True))
                if status == "SERVING":
                    return
            time.sleep(connection.READY_POLL_SECONDS)
        raise connection.not_ready(self.target, timeout_seconds, status)

    def close(self) -> None:
        """Ends the connection; calls in flight fail, and later ones raise RuntimeError."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _persist(
        self, method: _Method, payload: bytes, timeout_seconds: float | None, request_id: str = ""
    ) -> bytes:
        """``_call``, again and again while the server is unavailable and there is time."""
        attempts = Attempts(self._timeout(timeout_seconds), retry=self._retry)
        while True:
            try:
                return self._call(method, payload, attempts.left_seconds, request_id)
            except Unavailable as error:
                pause_seconds = attempts.pause_after(error)
                if pause_seconds is None:
                    raise
            time.sleep(pause_seconds)

    def _call(
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
            return method(
                payload,
                timeout=connection.deadline(timeout_seconds),
                metadata=connection.metadata(request_id),
                wait_for_ready=wait_for_ready,
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, request_id) from error

    def _timeout(self, timeout_seconds: float | None) -> float:
        return connection.checked_timeout(
            self._timeout_seconds if timeout_seconds is None else timeout_seconds
        )

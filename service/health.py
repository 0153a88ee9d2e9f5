"""grpc.health.v1 over one fact: whether requests are taken now.

Ours rather than grpcio-health-checking's servicer, which starts as SERVING and forgets watchers when
another one of the same service leaves.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from service import strict
from service.errors import FsaError
from service.servicer import SERVICE_NAME as ATTENTION
from service.servicer import Context

SERVICE_NAME = "grpc.health.v1.Health"

_SERVICES = ("", ATTENTION)
_Status = health_pb2.HealthCheckResponse


class HealthServicer:
    """NOT_SERVING until told otherwise. Belongs to the event loop."""

    def __init__(self) -> None:
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        return self._is_serving

    def set_serving(self, is_serving: bool) -> None:
        """Answer with this from now on, and tell everyone who watches."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake_watchers()

    def close(self) -> None:
        """End the streams of those who watch; open ones would hold up the server's stop."""
        self._is_closed = True
        self._wake_watchers()

    async def Check(self, raw: bytes, context: Context) -> bytes:
        """HealthCheckRequest to HealthCheckResponse; NOT_FOUND for a service that is not here."""
        service = await _service(raw, context)
        if service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return self._response(service)

    async def Watch(self, raw: bytes, context: Context) -> AsyncIterator[bytes]:
        """HealthCheckRequest to a stream of HealthCheckResponse: the status now, and each other one."""
        service = await _service(raw, context)
        while not self._is_closed:
            changed = self._changed
            yield self._response(service)
            await changed.wait()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the gRPC server needs to route the service's methods here, as bytes both ways."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Check": grpc.unary_unary_rpc_method_handler(self.Check),
            "Watch": grpc.unary_stream_rpc_method_handler(self.Watch),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    def _response(self, service: str) -> bytes:
        known = _Status.SERVING if self._is_serving else _Status.NOT_SERVING
        status = known if service in _SERVICES else _Status.SERVICE_UNKNOWN
        return _Status(status=status).SerializeToString()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _service(raw: bytes, context: Context) -> str:
    try:
        request, _ = strict.parse(health_pb2.HealthCheckRequest, raw)
    except FsaError as error:
        await context.abort(error.code, error.message)
    return str(request.service)

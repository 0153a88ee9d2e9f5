"""The parts of the front end, joined; one object to start, drain and stop."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio
import torch
from grpc_reflection.v1alpha import reflection

from fsa_core.api import resolve_backend
from fsa_core.tuning_table import read_table, table_for
from service import health, info, servicer
from service.admission import Admission
from service.arena import SEGMENT_BYTES, ArenaPool
from service.batcher import Batcher, BatchLimits
from service.config import MAX_MESSAGE_BYTES, MIB, Settings
from service.device_worker import DeviceWorker
from service.devices import DeviceSpec, NoSuchDevice, discover
from service.dispatcher import Dispatcher
from service.interceptors import RequestInterceptor
from service.metrics import Metrics, MetricsServer
from service.warmup import WarmUp
from service.worker_client import WorkerClient

log = logging.getLogger("fsa.server")

# A message this much over the limit still gets our own refusal, which says why; gRPC cuts off the rest.
MESSAGE_SLACK_BYTES = 16 * MIB


class CannotListen(Exception):
    """A port could not be opened; the text says which."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports that are open, whatever was asked for."""

    grpc: int
    metrics: int


class App:
    """Belongs to the event loop that it is made in."""

    def __init__(self, settings: Settings) -> None:
        """Raises NoSuchDevice and TuningError."""
        if settings.tuning_file is not None:
            read_table(settings.tuning_file)
        devices = discover(settings.devices)
        for spec in devices:
            _check_backend(settings.backend.value, spec)
            # A worker that looks into a table that is not valid answers nothing, and is never up.
            table_for(spec.name)
        self._settings = settings
        self._is_draining = self._is_stopping = False
        self._metrics = Metrics()
        self._metrics_server: MetricsServer | None = None
        # One segment is kept in use by the requests that warm workers up.
        segment_bytes = min(SEGMENT_BYTES, settings.max_inflight_bytes)
        self._arena = ArenaPool(
            settings.max_inflight_bytes + segment_bytes,
            segment_bytes=segment_bytes,
            initial_bytes=segment_bytes,
        )
        self._health = health.HealthServicer()
        self._dispatcher = Dispatcher(
            [self._worker(spec) for spec in devices],
            Batcher(_batch_limits(settings)),
            self._metrics,
            worker_wait_seconds=settings.worker_wait_seconds,
            on_serving_change=self._serving_changed,
        )
        self._admission = Admission(settings, self._arena)
        self._executor = _executor()
        self._servicer = servicer.AttentionServicer(
            self._admission,
            self._dispatcher,
            self._metrics,
            self._executor,
            max_message_bytes=settings.max_message_bytes,
            describe=lambda: info.describe(settings, self._dispatcher.workers),
        )
        self._server = self._make_server()
        self._watch()

    async def start(self) -> Ports:
        """Opens the ports and starts the workers; health says when they answer.

        Raises CannotListen.
        """
        ports = self._listen()
        await self._server.start()
        await self._dispatcher.start()
        return ports

    async def drain(self) -> None:
        """NOT_SERVING and no new requests from now on; returns when answers to those in flight are sent."""
        self._is_draining = True
        self._health.set_serving(False)
        self._dispatcher.drain()
        await self._servicer.drain()

    async def stop(self, *, grace_seconds: float) -> None:
        """Ends everything, whatever is still in flight after ``grace_seconds``."""
        self._is_stopping = True
        self._health.close()
        await asyncio.gather(
            self._server.stop(grace_seconds),
            self._dispatcher.stop(grace_seconds),
        )
        if self._metrics_server is not None:
            self._metrics_server.close()
        self._executor.shutdown(wait=False)

    def _worker(self, spec: DeviceSpec) -> DeviceWorker:
        client = WorkerClient(
            spec,
            self._arena,
            backend=self._settings.backend.value,
            tuning_file=str(self._settings.tuning_file) if self._settings.tuning_file else None,
            batch_timeout_seconds=self._settings.batch_timeout_seconds,
            healthy_seconds=self._settings.worker_healthy_seconds,
            log_level=self._settings.log_level.value,
            log_format=self._settings.log_format.value,
        )
        return DeviceWorker(client, WarmUp(self._arena))

    def _make_server(self) -> grpc.aio.Server:
        settings = self._settings
        longest = min(settings.max_message_bytes + MESSAGE_SLACK_BYTES, MAX_MESSAGE_BYTES)
        server = grpc.aio.server(
            interceptors=[RequestInterceptor(self._metrics, lambda: self._is_stopping)],
            options=[
                ("grpc.max_receive_message_length", longest),
                ("grpc.max_send_message_length", longest),
                # Identity alone: gRPC looks at the size of a message before it unpacks it, and a megabyte may
                # become a gigabyte.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                # A port that is taken is an error, not a port shared with a stranger.
                ("grpc.so_reuseport", 0),
                # Notices clients that vanished, and lets idle ones keep their connection open.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        server.add_generic_rpc_handlers((self._servicer.handlers(), self._health.handlers()))
        if settings.reflection:
            names = (servicer.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _watch(self) -> None:
        self._metrics.watch_queue(lambda: self._dispatcher.queue_depth)
        self._metrics.watch_inflight_bytes("host", lambda: self._admission.host_bytes)
        self._metrics.watch_inflight_bytes("workspace", lambda: self._admission.workspace_bytes)
        self._metrics.watch_workers(self._dispatcher.workers)
        self._metrics.set_build_info(info.build_versions())

    def _listen(self) -> Ports:
        settings = self._settings
        try:
            self._metrics_server = self._metrics.listen(settings.host, settings.metrics_port)
        except OSError as error:
            raise CannotListen(
                f"the metrics port {settings.host}:{settings.metrics_port}: {error.strerror}"
            ) from error
        try:
            port = self._server.add_insecure_port(_address(settings.host, settings.port))
        except RuntimeError as error:
            raise CannotListen(f"the gRPC port {settings.host}:{settings.port}: is it taken?") from error
        return Ports(port, self._metrics_server.port)

    def _serving_changed(self, is_serving: bool) -> None:
        log.info("a worker is up" if is_serving else "no worker is up")
        self._health.set_serving(is_serving and not self._is_draining)


def _check_backend(backend: str, spec: DeviceSpec) -> None:
    """Raises NoSuchDevice where no worker of ``spec`` could answer a request."""
    try:
        resolve_backend(backend, torch.device(spec.kind))
    except ValueError as error:
        raise NoSuchDevice(str(error)) from error


def _batch_limits(settings: Settings) -> BatchLimits:
    return BatchLimits(
        requests=settings.max_batch_requests,
        tokens=settings.max_batch_tokens,
        num_bytes=settings.max_batch_bytes,
        delay_seconds=settings.max_batch_delay_seconds,
    )


def _executor() -> ThreadPoolExecutor:
    """Threads for payloads, sharing the cores with torch's own threads in each of them."""
    cores = len(os.sched_getaffinity(0))
    num_threads = min(4, cores)
    torch.set_num_threads(max(1, cores // num_threads))
    return ThreadPoolExecutor(num_threads, thread_name_prefix="fsa-payload")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

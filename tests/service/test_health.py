"""grpc.health.v1 in front of a real server whose worker comes and goes."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2

from service.health import HealthServicer
from tests.serving import (
    HEALTH_CHECK,
    HEALTH_WATCH,
    ServerProcess,
    eventually,
    refusal_of,
    request_of,
    running_server,
)

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def fresh_server(tmp_path: Path, device: torch.device) -> Iterator[ServerProcess]:
    """Its port is open; its worker is on its way."""
    with running_server(tmp_path / "log", devices=device.type) as server:
        yield server


def watch(server: ServerProcess, service: str = "") -> list[str]:
    """The statuses that a Watch call has told so far."""
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    call = server.channel.unary_stream(HEALTH_WATCH)(request)
    seen: list[str] = []

    def read() -> None:
        try:
            for raw in call:
                seen.append(Status.ServingStatus.Name(Status.FromString(raw).status))
        except grpc.RpcError:
            seen.append("ENDED")

    threading.Thread(target=read, daemon=True).start()
    return seen


def test_health_follows_the_worker_from_its_start_through_its_death(
    fresh_server: ServerProcess, make_case: Callable[..., Any]
) -> None:
    server, request = fresh_server, request_of(make_case())
    assert server.health() == "NOT_SERVING"
    with pytest.raises(grpc.RpcError) as caught:
        server.attend(request)
    refused = refusal_of(caught.value)
    assert (refused.code, refused.reason) == ("UNAVAILABLE", "NO_WORKER")
    assert refused.retry_after_seconds
    seen = watch(server)
    others = watch(server, "fsa.v1.AttentionService")

    server.wait_for_health("SERVING")
    server.attend(request)
    device = server.info().devices[0]
    label = "cpu" if device.kind == "cpu" else f"{device.kind}:{device.index}"
    assert server.metrics()["fsa_worker_up", label] == 1
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGKILL)
    server.wait_for_health("NOT_SERVING", seconds=1)
    assert not server.info().devices[0].up
    server.wait_for_health("SERVING")
    server.attend(request)

    told = ["NOT_SERVING", "SERVING", "NOT_SERVING", "SERVING"]
    eventually(lambda: seen == told and others == told, what=f"{seen} {others}")
    assert server.metrics()["fsa_worker_restarts_total", "killed"] == 1


def test_a_leaving_watcher_takes_no_other_with_it_and_unknown_services_are_unknown() -> None:
    async def scenario() -> None:
        health = HealthServicer()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((health.handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            open_watch = channel.unary_stream(HEALTH_WATCH, response_deserializer=Status.FromString)
            leaving, staying = open_watch(b""), open_watch(b"")
            assert (await leaving.read()).status == Status.NOT_SERVING
            assert (await staying.read()).status == Status.NOT_SERVING
            leaving.cancel()
            await asyncio.sleep(0.05)
            health.set_serving(True)
            assert (await asyncio.wait_for(staying.read(), 5)).status == Status.SERVING

            unknown = health_pb2.HealthCheckRequest(service="no.such.Service").SerializeToString()
            assert (await open_watch(unknown).read()).status == Status.SERVICE_UNKNOWN
            for raw, code in ((unknown, "NOT_FOUND"), (b"\xff\xff", "INVALID_ARGUMENT")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(HEALTH_CHECK)(raw)
                assert caught.value.code().name == code
            health.close()
            assert await asyncio.wait_for(staying.read(), 5) is grpc.aio.EOF
        await server.stop(None)

    asyncio.run(scenario())

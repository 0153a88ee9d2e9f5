"""What a failure looks like to the client."""

import ast
import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fsa_core import block_csr, block_mask, compact, validation, vertical_slash
from fsa_core.nsa import selecting
from service import codec, dispatcher, selection, tensors
from service.errors import CODES, MAX_TEXT_LENGTH, FsaError
from service.interceptors import RequestInterceptor
from service.metrics import Metrics
from service.servicer import SERVICE_NAME
from tests.serving import LEAK, SERVER_INFO, Refusal, refusal_of


@asynccontextmanager
async def failing_with(error_of: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server whose GetServerInfo calls ``error_of``, behind the real interceptor."""

    async def behaviour(raw: bytes, context: Any) -> bytes:
        return bytes(error_of())

    server = grpc.aio.server(interceptors=[RequestInterceptor(Metrics())])
    methods = {"GetServerInfo": grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


def refusal(error_of: Any, **call: Any) -> Refusal:
    async def scenario() -> Refusal:
        async with failing_with(error_of) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(SERVER_INFO)(b"", **call)
            return refusal_of(caught.value)

    return asyncio.run(scenario())


def raising(error: Exception) -> Any:
    def behaviour() -> bytes:
        raise error

    return behaviour


@pytest.mark.parametrize("reason", CODES)
def test_every_reason_reaches_the_client_with_its_code(reason: str) -> None:
    error = FsaError(reason, "a sentence", metadata={"field": "q"})
    got = refusal(raising(error), metadata=[("x-request-id", "mine")])
    assert (got.code, got.reason, got.message) == (CODES[reason].name, reason, "a sentence")
    assert got.metadata == {"field": "q", "request_id": "mine"}
    assert got.retry_after_seconds is None


def test_when_waiting_helps_the_client_is_told_how_long() -> None:
    error = FsaError("BUDGET_EXHAUSTED", "full", retry_after_seconds=0.25)
    assert refusal(raising(error)).retry_after_seconds == 0.25


@pytest.mark.parametrize(
    "break_it",
    [
        lambda: Path("/no/such/place/secret.key").read_bytes(),
        lambda: object().missing_attribute,  # type: ignore[attr-defined]
        lambda: {}[object()],
        lambda: codec.decode_attend(None),  # type: ignore[arg-type]
    ],
    ids=["path", "class", "address", "our own code"],
)
def test_a_bug_shows_the_request_id_and_nothing_else(break_it: Any) -> None:
    got = refusal(break_it, metadata=[("x-request-id", "id-1")])
    assert (got.code, got.reason, got.metadata) == ("INTERNAL", "INTERNAL", {"request_id": "id-1"})
    assert "id-1" in got.message
    assert not LEAK.search(got.message)


def test_an_unusable_id_in_the_headers_is_replaced() -> None:
    error = FsaError("DRAINING", "bye")
    got = refusal(raising(error), metadata=[("x-request-id", "with space " * 30)])
    assert got.metadata["request_id"].isalnum()


def test_texts_that_quote_a_client_are_cut_to_fit_the_trailers() -> None:
    error = FsaError("INVALID_SHAPE", "x" * 100_000, metadata={"value": "y" * 100_000})
    got = refusal(raising(error))
    assert len(got.message) == len(got.metadata["value"]) == MAX_TEXT_LENGTH


def test_every_reason_in_the_source_is_in_the_table() -> None:
    library = (validation, compact, block_csr, block_mask, vertical_slash, selecting)
    for module in (*library, codec, selection, tensors, dispatcher):
        for reason in literal_reasons(Path(inspect.getfile(module))):
            assert reason in CODES, f"{reason} of {module.__name__}"


RAISING = ("InputError", "FsaError", "refuse", "_refuse")


def literal_reasons(source: Path) -> set[str]:
    """The first arguments of all calls of RAISING that are written out."""
    calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    raised = [call for call in calls if getattr(call.func, "id", "") in RAISING]
    first = [call.args[0] for call in raised if call.args]
    return {node.value for node in first if isinstance(node, ast.Constant)}

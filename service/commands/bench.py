"""``fsa bench``: how fast a server answers, and where the time goes."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from service.commands.failures import CommandFailed, WrongUsage, client_failures
from service.commands.options import DEFAULT_TARGET, Duration, Json, Target, TimeoutSeconds
from service.commands.output import format_bytes, format_seconds, print_table

if TYPE_CHECKING:
    from service.bench.check import Check
    from service.bench.load import Load
    from service.bench.report import Distribution, Report
    from service.bench.workload import Shape
    from service.client import ServerInfo


def bench(
    target: Target = DEFAULT_TARGET,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one run each.")] = "1,8,64",
    duration: Duration = 10.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each run, instead of a duration.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Query and key tokens of a request.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Elements of a head.")] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Keys in a block.")] = 64,
    slots: Annotated[int, typer.Option(min=0, help="Blocks a token selects; 0: dense attention.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that make the load; half the cores, 4 at most.")
    ] = None,
    timeout_seconds: TimeoutSeconds = 60.0,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput under load, with the server's own stage timings.

    Requests are one causal sequence of random numbers; each token selects its own block, the first one
    and random others. Failures are counted, and any of them makes the exit code 1.
    """
    from service.bench.load import Load
    from service.bench.workload import DTYPES, Shape

    if dtype not in DTYPES:
        raise WrongUsage(f"--dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    runs = _parse_concurrency(concurrency)
    shape = Shape(tokens, heads, kv_heads, head_dim, block_size, slots, dtype)
    server, check = _check(target, shape, timeout_seconds)
    if not as_json:
        _print_header(server, shape, check)
    num_processes = processes or min(4, max(1, (os.cpu_count() or 1) // 2))
    reports = []
    for lanes in runs:
        load = Load(target, shape, lanes, duration, requests, timeout_seconds)
        reports.append(_run(load, num_processes))
        if not as_json:
            _print_report(reports[-1])
    if as_json:
        _print_json(server, shape, check, reports)
    _fail_on_failures(reports)


def _parse_concurrency(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise WrongUsage(f"--concurrency is {text!r}; it must be positive integers, such as 1,8,64")
    return values


def _check(target: str, shape: "Shape", timeout_seconds: float) -> tuple["ServerInfo", "Check"]:
    from service.bench.check import WrongAnswer, check_answer
    from service.bench.workload import make_request
    from service.client import AttentionClient

    with (
        client_failures(target),
        AttentionClient(target, timeout_seconds=timeout_seconds, retry=False) as client,
    ):
        server = client.server_info()
        limit = server.limits.max_message_bytes
        if shape.request_bytes > limit:
            raise CommandFailed(
                f"a request has {format_bytes(shape.request_bytes)}; the server at {target} takes "
                f"{format_bytes(limit)} at most (max_message_bytes)"
            )
        try:
            request = make_request(shape, seed=0)
        except MemoryError as error:
            size = format_bytes(shape.request_bytes)
            raise CommandFailed(f"this machine has not the memory to make a request of {size}") from error
        answer = client.attend(request.q, request.k, request.v, request.pattern)
    try:
        return server, check_answer(shape, request, answer.out)
    except WrongAnswer as error:
        raise CommandFailed(f"the server at {target} answers wrongly: {error}") from error


def _run(load: "Load", num_processes: int) -> "Report":
    from service.bench.load import LoadFailed, run_load
    from service.bench.report import summarize

    try:
        with _progress(load) as on_sample:
            samples, elapsed_seconds = run_load(load, num_processes, on_sample)
    except LoadFailed as error:
        raise CommandFailed(f"concurrency {load.concurrency}: {error}") from error
    return summarize(load, samples, elapsed_seconds)


class _OnSample(Protocol):
    def __call__(self, count: int, elapsed_seconds: float) -> None: ...


@contextmanager
def _progress(load: "Load") -> Iterator[_OnSample]:
    """A bar on standard error that is gone when the run is over; none where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]} requests"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        description = f"concurrency {load.concurrency}"
        task = bar.add_task(description, total=load.requests or load.seconds, count=0)

        def on_sample(count: int, elapsed_seconds: float) -> None:
            bar.update(task, completed=count if load.requests else elapsed_seconds, count=count)

        yield on_sample


def _print_header(server: "ServerInfo", shape: "Shape", check: "Check") -> None:
    pattern = f"{shape.slots} blocks of {shape.block_size}" if shape.slots else "dense"
    error = "" if check.max_row_error is None else f", worst row off by {check.max_row_error:.1e} of its norm"
    rows = [
        ("server", f"{server.version} on {', '.join(device.name for device in server.devices)}"),
        ("request", f"{shape.tokens} tokens, {shape.q_heads}/{shape.kv_heads} heads of {shape.head_dim},"),
        ("", f"{pattern}, {shape.dtype}, {format_bytes(shape.tensor_bytes)} with the answer"),
        ("checked", f"against the {check.against}{error}" if error else "finite numbers only"),
    ]
    print_table(rows)


def _print_report(report: "Report") -> None:
    print()
    rows = [
        ("concurrency", str(report.concurrency)),
        ("answered", f"{report.answered} in {report.elapsed_seconds:.2f} s"),
        ("failed", ", ".join(f"{n} x {reason}" for reason, n in report.failures.items()) or "0"),
        (
            "throughput",
            f"{report.requests_per_second:.4g} requests/s, {report.tokens_per_second:.4g} tokens/s, "
            f"{report.bytes_per_second / 1e6:.4g} MB/s",
        ),
        ("batch", f"{report.mean_batch_requests:.2f} requests on average"),
    ]
    print_table(rows)
    if report.latency_seconds is not None:
        times = {"latency": report.latency_seconds, **report.stages_seconds}
        print_table([("", "MEAN", "P50", "P90", "P99"), *(_times_row(*item) for item in times.items())])


def _times_row(name: str, times: "Distribution") -> tuple[str, ...]:
    return name, *(format_seconds(value) for value in (times.mean, times.p50, times.p90, times.p99))


def _print_json(server: "ServerInfo", shape: "Shape", check: "Check", reports: list["Report"]) -> None:
    result = {
        "server": dataclasses.asdict(server),
        "shape": dataclasses.asdict(shape),
        "check": dataclasses.asdict(check),
        "runs": [dataclasses.asdict(report) for report in reports],
    }
    print(json.dumps(result, indent=2))


def _fail_on_failures(reports: list["Report"]) -> None:
    failed = sum(sum(report.failures.values()) for report in reports)
    if failed:
        total = failed + sum(report.answered for report in reports)
        raise CommandFailed(f"{failed} of {total} requests failed")

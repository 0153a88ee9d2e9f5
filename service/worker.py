"""The worker process of one device: receives batches, runs them, reports. Started by worker_client.py."""

import argparse
import faulthandler
import logging
import os
import socket
from collections.abc import Sequence

import torch

from service.channel import Channel
from service.config import LogFormat, LogLevel
from service.executor import CpuExecutor, CudaExecutor, Executor
from service.records import AddSegment, DropSegment, ProtocolError, Ready, Stop, Submit
from service.signals import die_with_parent
from service.telemetry import configure_logging
from service.worker_memory import Segments

log = logging.getLogger("fsa.worker")

PROTOCOL_EXIT_CODE = 65
ORPHANED_EXIT_CODE = 69


def main(arguments: Sequence[str] | None = None) -> int:
    """Work until the front end says Stop or goes away; returns the exit code."""
    options = _parse(arguments)
    configure_logging(LogLevel(options.log_level), LogFormat(options.log_format))
    faulthandler.enable()
    # The end of the socket says the same, but is not heard during a long batch on the CPU.
    die_with_parent()
    channel = Channel(socket.socket(fileno=options.control_fd))
    executor = _make_executor(options, channel)
    try:
        channel.send(Ready(executor.describe(), executor.memory()))
        serve(channel, executor)
    except ProtocolError:
        log.critical("the front end sent what is no record; the worker ends", exc_info=True)
        return PROTOCOL_EXIT_CODE
    except EOFError:
        log.warning("the front end is gone; the worker ends")
        return ORPHANED_EXIT_CODE
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m service.worker", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="inherited end of the control socket")
    parser.add_argument("--device", required=True, help="cpu, or cuda:N by the front end's numbering")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--num-threads", type=int, default=0, help="of torch on the CPU; 0: one a core")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="json")
    return parser.parse_args(arguments)


def _make_executor(options: argparse.Namespace, channel: Channel) -> Executor:
    kind, _, index = options.device.partition(":")
    if kind == "cuda":
        return CudaExecutor(int(index), options.backend, channel.send)
    torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
    return CpuExecutor(0, options.backend, channel.send)


def serve(channel: Channel, executor: Executor) -> None:
    """Take records until Stop. Raises ProtocolError and EOFError as they come."""
    segments = Segments()
    while True:
        record, descriptor = channel.receive()
        match record:
            case Submit():
                executor.submit(record.batch, [segments.place(job) for job in record.jobs])
            case AddSegment() if descriptor is not None:
                executor.pin(segments.add(record.segment, descriptor, record.num_bytes))
            case DropSegment():
                executor.unpin(segments.drop(record.segment))
            case Stop():
                executor.drain()
                return
            case _:
                raise ProtocolError(f"{type(record).__name__} is not for a worker")


if __name__ == "__main__":
    raise SystemExit(main())

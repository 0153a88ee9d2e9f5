"""What this server says of itself: GetServerInfo and the labels of fsa_build_info."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import torch

from fsa_core.problem import BLOCK_SIZES, MAX_HEAD_DIM, MIN_HEAD_DIM
from service import __version__
from service.admission import MAX_KERNEL_SIZE
from service.config import Backend, Settings
from service.device_worker import DeviceWorker
from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2

PROTOCOL = "fsa.v1"


def build_versions() -> dict[str, str]:
    """Versions known without a device."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_or_none("triton"),
        "grpc": grpc.__version__,
    }


def describe(settings: Settings, workers: Sequence[DeviceWorker]) -> attention_pb2.GetServerInfoResponse:
    """The whole answer of GetServerInfo, as things are now."""
    return attention_pb2.GetServerInfoResponse(
        version=__version__,
        protocol=PROTOCOL,
        devices=[_device(worker) for worker in workers],
        dtypes=[tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_BFLOAT16, tensor_pb2.DTYPE_FLOAT32],
        patterns=[variant.name for variant in _variants()],
        limits=_limits(settings),
        kernels=sorted({_kernel(settings.backend, worker.client.spec.kind) for worker in workers}),
        versions=_versions(workers),
        pattern_limits=[_pattern_limits(variant, settings) for variant in _variants()],
    )


def _variants() -> Sequence[Any]:
    """Field descriptors of the SparsityPattern variants, in the order of their numbers."""
    fields = pattern_pb2.SparsityPattern.DESCRIPTOR.oneofs_by_name["kind"].fields
    return sorted(fields, key=lambda field: field.number)


def _pattern_limits(variant: Any, settings: Settings) -> attention_pb2.PatternLimits:
    return attention_pb2.PatternLimits(
        name=variant.name,
        max_slots=0 if variant.name == "dense" else settings.max_slots,
        shared_rows="query_block_size" in variant.message_type.fields_by_name,
        causal_only=variant.name in ("vertical_slash", "select"),
        max_kernel_size=MAX_KERNEL_SIZE if variant.name == "select" else 0,
    )


def _device(worker: DeviceWorker) -> attention_pb2.Device:
    known, spec = worker.client.device, worker.client.spec
    return attention_pb2.Device(
        index=spec.index,
        kind=spec.kind,
        name=known.name if known else "",
        memory_bytes=known.memory_bytes if known else 0,
        up=worker.is_up,
    )


def _limits(settings: Settings) -> attention_pb2.Limits:
    return attention_pb2.Limits(
        max_message_bytes=settings.max_message_bytes,
        max_inflight_bytes=settings.max_inflight_bytes,
        max_inflight_requests=settings.max_inflight_requests,
        max_tokens=settings.max_tokens,
        max_sequences=settings.max_sequences,
        max_q_heads=settings.max_q_heads,
        min_head_dim=MIN_HEAD_DIM,
        max_head_dim=MAX_HEAD_DIM,
        block_sizes=BLOCK_SIZES,
        max_slots=settings.max_slots,
        workspace_bytes=settings.max_workspace_bytes,
        max_batch_requests=settings.max_batch_requests,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_delay_seconds=settings.max_batch_delay_seconds,
    )


def _kernel(backend: Backend, device_kind: str) -> str:
    if backend is not Backend.AUTO:
        return backend.value
    return "triton" if device_kind == "cuda" else "cpu"


def _versions(workers: Sequence[DeviceWorker]) -> Mapping[str, str]:
    """The worker's own word counts for torch, triton and cuda: it computes the answers."""
    versions = build_versions()
    for worker in workers:
        if (device := worker.client.device) is not None:
            told = {
                "torch": device.torch_version,
                "triton": device.triton_version,
                "cuda": device.cuda_version,
            }
            versions |= {name: text for name, text in told.items() if text}
    return {name: text for name, text in versions.items() if text and name != "version"}


def _version_or_none(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

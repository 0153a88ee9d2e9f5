"""Which devices this host offers, found without touching CUDA: the front end never owns a context."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device to start a worker on.

    ``uuid`` is what CUDA_VISIBLE_DEVICES of the worker is set to ("" for the CPU), so that a worker sees
    its own GPU alone, as cuda:0, whatever order CUDA would number them in.
    """

    kind: str
    index: int
    uuid: str = ""

    @property
    def label(self) -> str:
        """The device as metrics and logs name it: ``cpu``, ``cuda:0``, ``cuda:1`` ..."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a started worker says of its device; "" for a version that it does not have."""

    kind: str
    index: int
    name: str
    memory_bytes: int
    torch_version: str
    triton_version: str
    cuda_version: str


def discover() -> tuple[DeviceSpec, ...]:
    """Every visible CUDA device, or the CPU where there is none."""
    raise NotImplementedError

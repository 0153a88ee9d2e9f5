"""Which devices this host offers, found without touching CUDA: the front end never owns a context."""

import logging
import os
from dataclasses import dataclass, field

import torch

log = logging.getLogger("fsa.devices")


class NoSuchDevice(Exception):
    """A device that was asked for is not there, or hidden by CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device to start a worker on.

    ``uuid`` is what CUDA_VISIBLE_DEVICES of the worker is set to ("" for the CPU), so that a worker sees
    its own GPU alone, whatever order CUDA would number them in. ``name``: as the driver names it, "" for a
    part of a GPU.
    """

    kind: str
    index: int
    uuid: str = ""
    name: str = field(default="", compare=False)

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


CPU = DeviceSpec("cpu", 0, name="cpu")


def discover(devices: str = "auto") -> tuple[DeviceSpec, ...]:
    """The devices to serve on; ``devices`` is that of service.config.Settings.

    auto: every visible GPU, or the CPU where there is none; cpu; cuda: every visible GPU; or cuda:N,...,
    numbered among the visible ones.

    Raises:
        NoSuchDevice: a GPU was asked for that is not there.
    """
    if devices == "cpu":
        return (CPU,)
    gpus = _visible_gpus()
    if devices == "auto":
        return gpus or (CPU,)
    by_label = {gpu.label: gpu for gpu in gpus}
    wanted = dict.fromkeys(by_label if devices == "cuda" else devices.split(","))
    missing = [label for label in wanted if label not in by_label]
    if missing or not wanted:
        raise NoSuchDevice(f"no {', '.join(missing) or 'GPU'} here; visible: {', '.join(by_label) or 'none'}")
    return tuple(by_label[label] for label in wanted)


def _visible_gpus() -> tuple[DeviceSpec, ...]:
    names = _installed_gpus()
    uuids = visible_uuids(list(names), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(DeviceSpec("cuda", i, uuid, names.get(uuid, "")) for i, uuid in enumerate(uuids))


def _installed_gpus() -> dict[str, str]:
    """Names by UUID, in the order of the PCI bus, from the driver's management library."""
    if torch.version.cuda is None:
        log.info("this torch was built without CUDA, so GPUs are not looked for")
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no NVIDIA driver, so no GPU", extra={"detail": str(error)})
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuid_of, name_of = pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName
        return {_text(uuid_of(handle)): _text(name_of(handle)) for handle in handles}
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    """Older releases of the binding give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def visible_uuids(installed: list[str], variable: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES leaves of ``installed``, in its order; None: it is not set.

    As CUDA reads it: numbers, UUIDs and unique beginnings of UUIDs, up to the first entry that names none.
    MIG instances are passed on by name. Source: CUDA C++ Programming Guide, environment variables.
    """
    if variable is None:
        return installed
    visible: list[str] = []
    for entry in (entry.strip() for entry in variable.split(",")):
        if entry.startswith("MIG-"):
            uuid: str | None = entry
        elif entry.isdecimal():
            uuid = installed[int(entry)] if int(entry) < len(installed) else None
        else:
            matches = [uuid for uuid in installed if entry and uuid.startswith(entry)]
            uuid = matches[0] if len(matches) == 1 else None
        if uuid is None or uuid in visible:
            break
        visible.append(uuid)
    return visible

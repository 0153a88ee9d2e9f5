import pytest

from service.devices import CPU, DeviceSpec, NoSuchDevice, discover, visible_uuids

INSTALLED = ["GPU-aaaa-1", "GPU-aaab-2", "GPU-bbbb-3"]


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        (None, INSTALLED),
        ("", []),
        ("2,0", ["GPU-bbbb-3", "GPU-aaaa-1"]),
        ("1, 2", ["GPU-aaab-2", "GPU-bbbb-3"]),
        ("0,-1,1", ["GPU-aaaa-1"]),
        ("0,7,1", ["GPU-aaaa-1"]),
        ("0,0", ["GPU-aaaa-1"]),
        ("GPU-b", ["GPU-bbbb-3"]),
        ("GPU-aaa", []),
        ("GPU-bbbb-3,GPU-aaaa", ["GPU-bbbb-3", "GPU-aaaa-1"]),
        ("MIG-1234", ["MIG-1234"]),
        ("none", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(variable: str | None, visible: list[str]) -> None:
    assert visible_uuids(INSTALLED, variable) == visible


def test_hidden_gpus_leave_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert discover("auto") == discover("cpu") == (CPU,)
    for devices in ("cuda", "cuda:0", "cuda:0,cuda:1"):
        with pytest.raises(NoSuchDevice, match="visible: none"):
            discover(devices)


def test_every_gpu_torch_sees_is_found(device: object) -> None:
    import torch

    if str(device) != "cuda":
        pytest.skip("needs --device cuda")
    found = discover("auto")
    assert [spec.label for spec in found] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert discover("cuda") == found
    assert discover("cuda:0") == found[:1]
    assert all(spec.uuid.startswith(("GPU-", "MIG-")) for spec in found)


def test_labels_name_the_device() -> None:
    assert CPU.label == "cpu"
    assert DeviceSpec("cuda", 3, "GPU-x").label == "cuda:3"

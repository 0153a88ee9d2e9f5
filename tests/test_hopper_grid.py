"""The kernels are compiled for the GPU they are meant for also where there is none."""

import os
import subprocess
import sys

import pytest

KERNELS = {
    "selected": (
        "_partial",
        "_merge",
        "_expand",
        "_list_rows",
        "_attend",
        "_attend_token",
        "_gradients",
        "_of_tiles",
        "_of_pairs",
    ),
    "windows": ("_attend_windows", "_select", "_of_queries", "_of_keys", "_sum_splits", "_means", "_spread"),
    "decode": ("_attend_slots", "_merge_splits"),
}
FOR_HOPPER_ALONE = {
    "selected": (
        "gradients",
        "attend",
        "of_tiles",
        "attend_pairs",
        "of_pairs",
        "agree",
        "rank",
        "_join_lists",
    ),
    "windows": ("attend_windows", "of_windows", "of_queries", "select"),
    "decode": (),
}


# Two minutes of compiling where nothing else runs, five where much does.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_largest_and_the_oddest_shapes_compile_for_hopper_within_its_shared_memory(kernels: str) -> None:
    # A process of its own: this one's kernels are the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper_grid", "--only", kernels]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    for kernel in KERNELS[kernels]:
        assert told.stdout.count(f" {kernel}: ") >= 3
    for kernel in FOR_HOPPER_ALONE[kernels]:
        assert told.stdout.count(f" {kernel}: ") >= 1

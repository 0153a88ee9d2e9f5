"""The kernels are compiled for the GPU they are meant for also where there is none."""

import os
import subprocess
import sys


def test_the_largest_and_the_oddest_shapes_compile_for_hopper_within_its_shared_memory() -> None:
    # A process of its own: this one's kernels are the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper_grid"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    kernels = ("_partial", "_merge", "_attend", "_gradients", "_of_tiles", "_of_pairs")
    decode = ("_attend_slots", "_merge_splits")
    for kernel in (*kernels, *decode, "_attend_windows", "_select", "_of_queries", "_of_keys"):
        assert told.stdout.count(f"{kernel}: ") >= 3

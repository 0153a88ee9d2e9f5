"""Kernels that are written for Hopper alone, in Gluon: where they can run, and what they have in common.

Gluon is Triton's language below ``tl``: layouts, shared memory, barriers and which warps do what are the
kernel's own business. A few warps gather rows into shared memory with asynchronous copies (cp.async), the
others multiply what has arrived (wgmma), and neither waits for the other until a buffer is full or empty.
Every such kernel has a twin in ``tl``, which is what runs on other GPUs and in Triton's interpreter.

Modules that import Gluon are imported once ``runs_on`` has said that they can be.
"""

from functools import lru_cache

import torch
import triton
from triton import knobs

# Those whose Gluon these kernels are written in; before 3.6 it was another language.
KNOWN_VERSIONS = ("3.6", "3.7")
CAPABILITY = (9, 0)
# Partials of a call from which on one launch for all chunks is faster, forward and for grad_q.
MIN_FORWARD_BYTES, MIN_GRADIENT_BYTES = 8 * 2**20, 256 * 2**20


# Once a device: every call asks, and whether kernels are interpreted was settled when they were made.
@lru_cache
def runs_on(device: torch.device) -> bool:
    if device.type != "cuda" or knobs.runtime.interpret:
        return False
    version = ".".join(triton.__version__.split(".")[:2])
    is_nvidia = torch.version.hip is None
    return version in KNOWN_VERSIONS and is_nvidia and torch.cuda.get_device_capability(device) == CAPABILITY

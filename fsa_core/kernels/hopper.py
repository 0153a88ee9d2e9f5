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
# Chunks from which on one launch takes them all, forward and for grad_q. Measured on an H200, random
# indices: with 16 and more the forward pass takes 1.01 to 0.94 of the time, with up to 8 1.04 to 1.24: a
# kernel that does nothing but merge keeps more loads under way. Gradients are faster from 4 on.
MIN_FORWARD_CHUNKS, MIN_GRADIENT_CHUNKS = 16, 4


def runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and _has_units(device) and not knobs.runtime.interpret


@lru_cache
def _has_units(device: torch.device) -> bool:
    version = ".".join(triton.__version__.split(".")[:2])
    is_nvidia = torch.version.hip is None
    return version in KNOWN_VERSIONS and is_nvidia and torch.cuda.get_device_capability(device) == CAPABILITY

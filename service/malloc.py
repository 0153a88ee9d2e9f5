"""Settings of glibc's allocator for a process that receives and sends large messages.

By default every message above a threshold gets pages of its own from the kernel, which clears them at
first touch: several times the cost of copying the message. These keep freed memory in the process and
let it be backed by huge pages. glibc reads them only when a process starts.
"""

import os
import sys

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def restart_tuned() -> None:
    """Replaces this process by itself with the settings in place; returns where they already are.

    What is set already, to whatever value, is left alone.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})

"""Memory of steps on a CPU: what is freed goes back, so that the peak is what a step keeps and no more."""

import ctypes
import os

_MMAP_THRESHOLD = -3  # Of mallopt, in glibc's malloc.h.
_BYTES = 2**20  # Smaller tensors are cheaper to keep than to map anew.


def return_large_blocks() -> bool:
    """Let glibc map tensors of 1 MiB and more one by one, for as long as the process lives: by its own rule it takes
    them from a heap that grows full of holes. Where MALLOC_MMAP_THRESHOLD_ is set that stays.

    Returns:
        Whether it is so now; not with other allocators.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        return ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _BYTES) == 1
    except (OSError, AttributeError, TypeError):  # No glibc: macOS, Windows, musl.
        return False

"""Memory that a process frees stays with it, instead of being given back and zeroed anew at each step."""

import ctypes
import platform

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
"""Parameters of glibc's mallopt (malloc.h)."""
TOP = 64 << 20
"""Bytes by which the heap grows at once."""


def keep_heap() -> bool:
    """Let glibc serve large blocks from its heap, and never trim that.

    A step frees as much as it takes; without this the kernel zeroes those pages at each step.

    Returns:
        Whether this C library could be told so; others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, TOP))
    return all(mallopt(name, value) == 1 for name, value in wanted)

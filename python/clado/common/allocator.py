"""What becomes of freed memory while a run is measured: it stays with the process, or goes back to the system at once."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# Of glibc's mallopt: what is free at the heap's end before it is given back; the block from which it is mapped by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MIB = 1 << 20
_outermost = Lock()  # held by the stage that others are inside of, in whatever thread


@contextmanager
def heap(keep: bool = True) -> Iterator[None]:
    """Let glibc keep up to 1 GiB of freed memory, or give every block of 1 MiB and more back; other C libraries do as they do.

    What is given back costs a fault for every page when it returns (up to 30 % of a run's time); what is kept lies in pieces
    that nothing fits into later (a process grew by three times its live values), so that a cap on memory would not hold.
    The outermost decides. Afterwards the thresholds are those that glibc itself comes to where blocks of 32 MiB are freed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not _outermost.acquire(blocking=False):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB if keep else _MIB)  # 32 MiB is the most that it takes
    libc.mallopt(_TRIM_THRESHOLD, 1024 * _MIB if keep else _MIB)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        libc.malloc_trim(0)
        _outermost.release()

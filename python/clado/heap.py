"""Freed memory stays with the process while it is measured: given back, every page of it costs a fault when it returns."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = (
    32 << 20
)  # the largest block that glibc takes from its heap; larger ones are mapped, and given back, one by one
_KEPT = 1 << 30


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep up to 1 GiB of freed memory; other C libraries do as they do.

    Afterwards it is given back, and the thresholds are those that glibc itself comes to where blocks of 32 MiB are freed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)

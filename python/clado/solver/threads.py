"""One BLAS thread: the matrices here are small, and more threads cost time and the last bits of repeatability."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """A context in which BLAS runs on one thread."""
    return _controller().limit(limits=1, user_api="blas")

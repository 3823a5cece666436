"""BLAS threads: few, for the matrices here are small, and a fixed number, since it decides the last bits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """A context in which BLAS runs on ``count`` threads."""
    return _controller().limit(limits=count, user_api="blas")

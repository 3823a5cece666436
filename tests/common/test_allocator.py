"""What glibc is told about freed memory; tests/profiling/test_memory.py has what comes of it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from clado.common import heap


class Library:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def mallopt(self, *values: int) -> None:
        self.told.append(values)

    def malloc_trim(self, pad: int) -> None:
        self.told.append((pad,))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    return library


@pytest.mark.parametrize("outer", [True, False])
def test_a_stage_inside_another_changes_nothing(library: Library, outer: bool) -> None:
    with heap(keep=outer):
        before = list(library.told)
        with heap(keep=not outer):
            assert library.told == before
        assert library.told == before
    assert len(library.told) == len(before) + 3  # thresholds and what is free go back once
    with heap(keep=outer):
        assert library.told[-2:] == before


def test_what_fails_inside_leaves_the_allocator_as_it_was(library: Library) -> None:
    def fails() -> Any:
        with heap():
            raise ValueError("inside")

    for _ in range(2):
        library.told.clear()
        with pytest.raises(ValueError, match="inside"):
            fails()
        assert len(library.told) == 5

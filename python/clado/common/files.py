"""Files appear whole or not at all: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import FileError

_AT_CWD, _EXCHANGE = -100, 2  # of renameat2


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed.

    Raises:
        FileError: what the file system refuses.
    """
    target = Path(path)
    with refused(target):
        temporary = _beside(target)
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            yield temporary
            _settle(temporary, mode)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, on any error it is removed.

    Where the system can exchange two folders in one step (Linux), a folder stands at ``path`` at every moment. Elsewhere
    the earlier one is moved aside first and put back if the new one cannot take its place.

    Raises:
        FileError: what the file system refuses.
    """
    target = Path(path)
    with refused(target):
        yield from _in_place_of(target)


@contextmanager
def refused(path: Path, must: str = "be writable") -> Iterator[None]:
    """What the file system, or safetensors on top of it, refuses as one line."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise FileError(path, must, error) from error


def _in_place_of(target: Path) -> Iterator[Path]:
    temporary = _beside(target)
    temporary.mkdir()
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                _settle(file, mode)
        if not target.exists():
            temporary.replace(target)
        elif not _exchange(temporary, target):
            target.replace(old)
            try:
                temporary.replace(target)
            except BaseException:
                old.replace(target)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A free name in the folder of ``target``, which is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def _settle(path: Path, mode: int) -> None:
    """Permissions as the system gives new files (safetensors writes its own for the owner alone), and all bytes on disk."""
    with suppress(OSError):  # a file system without permissions
        path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    found: bool = swap(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0
    return found


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(metadata, tensors) of one and the same file, whatever replaces it meanwhile.

    ``safe_open`` opens the path a second time for torch's tensors, and may find the next file there.
    """
    from safetensors.torch import load

    data = path.read_bytes()
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}, tensors


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))

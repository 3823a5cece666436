"""One process at a time writes to a run directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CladoError
from .files import refused

try:
    import fcntl
except ImportError:  # a system without it gets no lock
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path | None, op: str) -> Iterator[None]:
    """Hold ``folder`` alone, None: nothing. It is made if need be, and goes again if nothing was written to it.

    The system lets go of the lock when its process ends in whatever way; where a file system knows no locks there is none.

    Raises:
        CladoError: another process, or another call of this one, holds it; it cannot be written.
    """
    if folder is None or fcntl is None:
        yield
        return
    with refused(folder):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = _taken(folder / LOCK_FILE, op)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is held: who opened it before finds it gone
        os.close(handle)
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _taken(path: Path, op: str) -> int:
    """The lock file, open and locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise CladoError(
                f"{op}: output_dir must be written by one process at a time, got {path.parent}, held by {holder}"
            ) from None
        except OSError:
            return handle  # no locks here
        if _is_at(handle, path):
            with suppress(OSError):  # a full disk: the note is for people
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)  # its holder removed it in between


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
    except OSError:
        os.close(handle)
        raise

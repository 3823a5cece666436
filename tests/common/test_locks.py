"""One process at a time writes to a run directory; one that died holds nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import clado
from clado.common import locked

HOLD = """
import sys
from pathlib import Path
from clado.common import locked
with locked(Path(sys.argv[1]), "profile"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_in_one_line_until_it_ends(tmp_path: Path) -> None:
    for end in ("returns", "killed"):
        with holder(tmp_path / "run") as process:
            line = rf"solve: output_dir must be written by one process at a time, got .*run, held by process {process.pid} on "
            with pytest.raises(clado.CladoError, match=line) as caught, locked(tmp_path / "run", "solve"):
                pass
            assert "\n" not in str(caught.value)
            if end == "killed":
                process.send_signal(signal.SIGKILL)
            assert process.stdin is not None
            process.stdin.close()
        with locked(tmp_path / "run", "solve"):
            assert (tmp_path / "run").is_dir()
        left = [] if end == "returns" else [tmp_path / "run"]  # nothing was written, so nothing is left
        assert list(tmp_path.rglob("*")) == left


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with locked(tmp_path, "profile"):
        with pytest.raises(clado.CladoError, match=f"held by process {os.getpid()} on "), locked(tmp_path, "profile"):
            pass
        with locked(None, "profile"), locked(tmp_path / "other", "profile"):
            pass
    with locked(tmp_path, "profile"):
        (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(clado.CladoError, match=r"file: .*file/run must be writable, got "),
        locked(tmp_path / "file" / "run", ""),
    ):
        pass


def test_a_full_disk_does_not_keep_a_lock_from_being_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of who holds it is for people; without it the lock holds all the same."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    refused = pytest.raises(clado.CladoError, match="held by another process")
    with locked(tmp_path, "profile"), refused, locked(tmp_path, "profile"):
        pass

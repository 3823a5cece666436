"""A run killed at any moment resumes to the same bits; a full disk or a foreign directory loses nothing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clado
from clado import checkpoint
from clado.profiler import profile
from clado.sensitivity import Sensitivity
from tests.models import tiny_vit

# Forks a profile again and again from one warm process and kills each at a random moment of its measuring.
KILLS = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)  # no OpenMP team may exist at a fork
from clado import checkpoint
from clado.profiler import profile
from tests.models import tiny_vit

model, shape = tiny_vit()
x = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))
random.seed(0)
load = checkpoint.Chunks.load
kills = 0
while True:
    started, tell = os.pipe()
    child = os.fork()
    if child == 0:
        def telling(self, first):
            os.write(tell, b".")
            return load(self, first)
        checkpoint.Chunks.load = telling
        profile(model, [x], estimator="exact", batch_size=2, output_dir=sys.argv[1], verbose=False)
        os._exit(0)
    os.close(tell)
    os.read(started, 1)
    time.sleep(random.uniform(0.0, 0.12))
    if kills < int(sys.argv[2]):
        os.kill(child, signal.SIGKILL)
        kills += 1
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
print(kills, status)
"""


def data() -> tuple[torch.nn.Module, torch.Tensor]:
    model, shape = tiny_vit()
    return model, torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))


def same(one: Sensitivity, other: Sensitivity) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("delta_loss", "interaction", "stderr"))


@pytest.mark.slow
def test_resumes_to_the_same_bits_after_kills(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "8"], capture_output=True, text=True, check=True, timeout=300
    )
    kills, status = map(int, run.stdout.split())
    assert kills >= 5  # the run may get through before the last kill
    assert status == 0
    model, x = data()
    whole = profile(model, [x], estimator="exact", batch_size=2, verbose=False)
    assert same(Sensitivity.load(tmp_path), whole)
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".")]  # a kill may leave a temporary name
    assert left == ["sensitivity.safetensors"]


def test_interrupted_run_goes_on_and_does_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = data()
    whole = profile(model, [x], batch_size=8, verbose=False)
    saved, save = [], checkpoint.Chunks.save

    def interrupting(self: checkpoint.Chunks, first: int, sums: object) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(first)
        save(self, first, sums)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.Chunks, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        profile(model, [x], batch_size=8, output_dir=tmp_path, verbose=False)
    monkeypatch.setattr(
        checkpoint.Chunks, "save", lambda self, first, sums: (saved.append(first), save(self, first, sums))[1]
    )
    assert same(profile(model, [x], batch_size=8, output_dir=tmp_path, verbose=False), whole)
    assert saved == [0, 8, 16, 24, 32, 40]


def test_full_disk_is_one_line_and_keeps_finished_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = data()
    write, calls = checkpoint.save_file, []

    def full(tensors: object, path: Path, metadata: object) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(clado.CladoError, match="output_dir must have space left"):
        profile(model, [x], batch_size=8, output_dir=tmp_path, verbose=False)
    assert len(list((tmp_path / "chunks").iterdir())) == 2


def test_chunks_of_another_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = data()
    monkeypatch.setattr(checkpoint.Chunks, "clear", lambda self: None)
    profile(model, [x], output_dir=tmp_path, verbose=False)
    (tmp_path / "sensitivity.safetensors").unlink()
    with pytest.raises(clado.CladoError, match="whose data differ"):
        profile(model, [x[:40]], output_dir=tmp_path, verbose=False)
    for path in (tmp_path / "chunks").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(clado.CladoError, match="whole chunk files, got a damaged"):
        profile(model, [x], output_dir=tmp_path, verbose=False)

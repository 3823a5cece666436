"""Two ranks under torchrun give what one gives, and a rank that dies leaves a run that goes on."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clado.profiler import profile
from clado.sensitivity import Sensitivity
from tests.models import tiny_vit

# argv: folder, estimator, and the chunk at which rank 1 dies (-1: never). Every rank saves what it was given.
SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from clado.distributed import torchrun_group
from clado.profiler import profile
from clado.run import Run
from tests.test_distributed import data, SETTINGS

folder, estimator, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
with torchrun_group() as device:
    rank = torch.distributed.get_rank()
    measure, count = Run._estimate, 0
    def dying(self, chunk, tick):
        global count
        count += 1
        if rank == 1 and count == last:
            os._exit(7)
        return measure(self, chunk, tick)
    Run._estimate = dying
    model, loader = data()
    sens = profile(model, loader, estimator=estimator, output_dir=folder + "/run", device=device, **SETTINGS)
    sens.save(f"{folder}/rank{rank}.safetensors")
"""
SETTINGS = {"num_samples": 22, "batch_size": 4, "exact_samples": 5, "verbose": False}


def data() -> tuple[torch.nn.Module, torch.utils.data.DataLoader]:
    model, shape = tiny_vit()
    x = torch.randn(22, *shape, generator=torch.Generator().manual_seed(1))
    return model, torch.utils.data.DataLoader(x, batch_size=5, shuffle=True)


def two_ranks(folder: Path, estimator: str, last: int = -1) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    (folder / "script.py").write_text(SCRIPT)
    command += [str(folder / "script.py"), str(folder), estimator, str(last)]
    return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode


def tensors(sens: Sensitivity) -> list[np.ndarray]:
    return [sens.delta_loss, sens.interaction, sens.stderr, sens.sample_digests]


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_one_that_dies_loses_one_round(tmp_path: Path) -> None:
    model, loader = data()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does
    try:
        whole = profile(model, loader, estimator="corrected", **SETTINGS)  # type: ignore[arg-type]
        assert two_ranks(tmp_path, "corrected", last=2) != 0
        assert not (tmp_path / "rank0.safetensors").exists()
        resumed = profile(model, loader, estimator="corrected", output_dir=tmp_path / "run", **SETTINGS)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    # Sums of doubles of the same parts in the same order: the bits agree, 1e-12 is what is promised.
    for got, wanted in zip(tensors(resumed), tensors(whole), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)
    (tmp_path / "run" / "sensitivity.safetensors").unlink()
    (tmp_path / "run" / "progress.safetensors").unlink()
    assert two_ranks(tmp_path, "corrected") == 0
    for rank in range(2):
        given = Sensitivity.load(tmp_path / f"rank{rank}.safetensors")
        assert given.fingerprint == whole.fingerprint
        assert given.info["ranks"] == 2
        for got, wanted in zip(tensors(given), tensors(whole), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)

"""What a run is said to take before it starts, and what happens when memory does not suffice."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import clado
from clado.common import heap
from clado.graph.capture import Captured, capture
from clado.graph.rehearsal import LiveBytes
from clado.profiling import ESTIMATORS, Options, Run, open_run, plan_run, profile
from clado.profiling.losses import Categorical
from tests.models import tiny_vit

SAMPLES = 12


@pytest.fixture(scope="module")
def net() -> tuple[torch.nn.Module, torch.Tensor, Captured]:
    model, shape = tiny_vit()
    x = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(1))
    return model, x, capture(model, x[:2])


@pytest.fixture(autouse=True)
def captured_once(net: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("clado.graph.open.capture", lambda *_: net[2])
    with torch.no_grad():
        yield


def run(net: Any, **arguments: Any) -> Run:
    return open_run(net[0], [net[1]], Options(**{"scale_steps": 1, **arguments}))


@pytest.mark.parametrize("estimator", ["diagonal", "additive", "gradient", "corrected", "exact"])
def test_planned_live_values_are_those_that_live(net: Any, estimator: str) -> None:
    ready = run(net, estimator=estimator, batch_size=SAMPLES)
    planned = ready.pieces.chunk_bytes()
    weights = [variant.weight for own in ready.variants for variant in own]
    with LiveBytes(torch.device("cpu"), (weights, list(net[0].parameters()))) as live:
        ESTIMATORS[estimator].run(ready.runner, ready.variants, net[1], Categorical(), lambda: None)
    assert planned == pytest.approx(live.peak, rel=0.05)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


@LINUX
def test_freed_memory_is_kept_while_it_is_measured_and_given_back_under_a_cap() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(4 << 20) for _ in range(8)]  # 16 MiB each
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with heap(keep=True):
        assert min(faults() for _ in range(5)) < 1000  # 128 MiB are 32768 pages; holes may take a while to meet
    with heap(keep=False):
        assert faults() > 30000
    assert faults() > 10000


GROWTH = """
import torch
from pathlib import Path
from clado.profiling import open_run, Options
from clado.common import heap
from torch.nn import GELU, Linear, Sequential

def resident(line):
    return 1024 * int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0])

torch.set_num_threads(1)
parts = [Sequential(Linear(64, 64 * k), GELU(), Linear(64 * k, 64)) for k in range(2, 12)]  # blocks of every size
net = Sequential(*parts, Linear(64, 4))
settings = dict(batch_size=8192, num_samples=8192, quantize_ends=True, scale_steps=1)
with heap(keep=False), torch.no_grad():
    run = open_run(net.eval(), [torch.randn(8192, 64)], Options(estimator="logit", **settings))
    planned = run.pieces.fixed_bytes() + run.pieces.chunk_bytes()
    before = resident("VmRSS") - run.pieces.fixed_bytes()
    run.measure(verbose=False)
print(planned, resident("VmHWM") - before)
"""


@LINUX
def test_under_a_cap_the_process_grows_by_what_is_planned() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    planned, grown = map(int, done.stdout.split())
    assert planned > 100 << 20
    assert grown == pytest.approx(planned, rel=0.05)


def test_a_cap_lets_fewer_samples_and_then_fewer_perturbations_advance_together(net: Any) -> None:
    free = run(net, batch_size=SAMPLES)
    fixed, need = free.pieces.fixed_bytes(), free.pieces.chunk_bytes()
    assert need is not None
    half = run(net, max_memory=fixed + need // 2)
    assert half.pieces.together < SAMPLES
    assert half.pieces.fixed_bytes() + (half.pieces.chunk_bytes() or 0) <= fixed + need // 2
    one = run(net, batch_size=1)
    one.runner.stack = 2
    narrow = run(net, max_memory=fixed + (one.pieces.chunk_bytes() or 0))
    assert narrow.pieces.now == [1, 2]
    whole, small = free.measure(False), narrow.measure(False)
    assert np.abs(small.interaction - whole.interaction).max() < 1e-5 * np.abs(whole.interaction).max()
    with pytest.raises(clado.CladoError, match="max_memory must hold the weights"):
        run(net, max_memory=fixed)


def test_a_chunk_that_runs_out_of_memory_is_measured_in_halves(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = run(net, batch_size=SAMPLES)
    measure, calls = ESTIMATORS["additive"].run, []

    def limited(executor: Any, variants: Any, batch: Any, *rest: Any) -> Any:
        calls.append(len(batch))
        if len(batch) > 4 and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return measure(executor, variants, batch, *rest)

    monkeypatch.setitem(ESTIMATORS, "additive", replace(ESTIMATORS["additive"], run=limited))
    ready.pieces.together = 5
    found = ready.measure(False)
    assert calls == [5, 5, 3, 3, 1]  # the first five are not measured again
    assert found.num_samples == SAMPLES
    assert "out of memory: went on with 3 samples" in found.info["warnings"][0]


def test_an_estimator_that_never_fits_is_one_line(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.\nframes")

    monkeypatch.setitem(ESTIMATORS, "additive", replace(ESTIMATORS["additive"], run=never))
    with pytest.raises(clado.CladoError, match="must have memory for one sample") as caught:
        run(net).measure(False)
    assert "\n" not in str(caught.value)


def test_the_plan_counts_the_work(net: Any) -> None:
    how: dict[str, Any] = {"estimator": "exact", "scale_steps": 1, "rounding": "nearest"}
    plan = plan_run(net[0], [net[1]], **how)
    found = profile(net[0], [net[1]], verbose=False, **how)
    assert (plan.samples, plan.candidates, plan.layers) == (SAMPLES, found.num_candidates, len(found.layers))
    assert plan.evaluations == 1 + plan.candidates + 9 * plan.layers * (plan.layers - 1) // 2
    assert plan.forward_equivalents == pytest.approx(SAMPLES * found.info["forward_equivalents"])
    assert plan.seconds > 0
    assert "in all" in str(plan)
    with pytest.raises(clado.CladoError, match=r"arguments must be among those of .*, got colour"):
        plan_run(net[0], [net[1]], colour="red")

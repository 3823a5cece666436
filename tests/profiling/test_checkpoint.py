"""A run killed at any moment resumes to the same bits; a full disk or a foreign directory loses nothing; runs grow and merge."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import clado
from clado.artifacts import Sensitivity
from clado.graph.capture import Captured, capture
from clado.profiling import Options, checkpoint, open_run, plan_run, profile, run
from clado.quant import Variant, variants
from tests.models import tiny_vit

# Forks a profile again and again from one warm process and kills each at a random moment of its measuring, a few chunks on
# (a machine under load would let none of them get far in a given time), until so many kills are done; the run starts over in
# a new directory whenever it got through. Prints how many kills and runs that were, and how many resumes had other bits.
KILLS = """
import os, random, shutil, signal, sys, time, torch
import numpy as np
torch.set_num_threads(1)  # no OpenMP team may exist at a fork
from clado.profiling import Checkpoint, profile
from clado.artifacts import Sensitivity
from tests.models import tiny_vit

folder, wanted, rounding = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model, shape = tiny_vit()
x = torch.randn(47, *shape, generator=torch.Generator().manual_seed(1))
settings = dict(estimator="exact", batch_size=2, rounding=rounding, verbose=False)
whole = profile(model, [x], **settings)
random.seed(0)
kills = runs = other = 0
while kills < wanted or runs == 0 or os.path.exists(folder):
    steps, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for name in ("__init__", "add"):
            def telling(self, *arguments, step=getattr(Checkpoint, name)):
                os.write(tell, b".")
                step(self, *arguments)
            setattr(Checkpoint, name, telling)
        profile(model, [x], output_dir=folder, **settings)
        os._exit(0)
    os.close(tell)
    for _ in range(random.randint(1, 8)):
        os.read(steps, 1)  # nothing where the run is through
    if kills < wanted:
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(steps)
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        assert status == 0
        got = Sensitivity.load(folder)
        other += any(not np.array_equal(getattr(got, n), getattr(whole, n)) for n in ("delta_loss", "interaction", "stderr"))
        files = sorted(name for name in os.listdir(folder) if not name.startswith("rounded-"))
        assert files == ["progress.safetensors", "sensitivity.safetensors"], os.listdir(folder)
        assert len(os.listdir(folder)) == 2 + (rounding == "compensated"), os.listdir(folder)
        shutil.rmtree(folder)
        runs += 1
print(kills, runs, other)
"""

HOWS = [{"rounding": "nearest"}, {"rounding": "compensated", "moment_samples": 8}]
under_both_roundings = pytest.mark.parametrize("how", HOWS, ids=["nearest", "compensated"])


@cache
def data() -> tuple[torch.nn.Module, torch.Tensor]:
    model, shape = tiny_vit()
    return model, torch.randn(44, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One torch.export for all runs of the same model: it takes longer than the runs."""
    monkeypatch.setattr("clado.graph.open.capture", lambda model, example, *rest: captured(model.head.weight.dtype))


@cache
def captured(dtype: torch.dtype) -> Captured:
    model, x = data()
    return capture(deepcopy(model).to(dtype), x[:2].to(dtype))


def same(one: Sensitivity, other: Sensitivity) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("delta_loss", "interaction", "stderr"))


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks that were measured, in order."""
    sizes: list[int] = []
    add = checkpoint.Checkpoint.add

    def noting(self: checkpoint.Checkpoint, part: object, digests: torch.Tensor) -> None:
        sizes.append(len(digests))
        add(self, part, digests)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.Checkpoint, "add", noting)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kills", [10])
def test_resumes_to_the_same_bits_after_kills(kills: int, rounding: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLS, str(tmp_path / "run"), str(kills), rounding]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr
    done, runs, other = map(int, finished.stdout.split())
    assert done == kills
    assert runs >= 1
    assert other == 0


def breaking(x: torch.Tensor, after: int, error: type[BaseException]) -> Iterator[torch.Tensor]:
    """Batches of four that end in an error."""
    yield from x[:after].split(4)
    raise error("the disk with the images is gone")


@under_both_roundings
@pytest.mark.parametrize(("error", "caught"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, clado.CladoError)])
def test_interrupted_run_goes_on_and_does_not_repeat(
    error: type[BaseException],
    caught: type[BaseException],
    how: dict[str, Any],
    tmp_path: Path,
    finished: list[int],
) -> None:
    model, x = data()
    whole = profile(model, [x], batch_size=8, verbose=False, **how)
    finished.clear()
    with pytest.raises(caught, match="images is gone"):
        profile(model, breaking(x, 28, error), batch_size=8, output_dir=tmp_path, verbose=False, **how)
    assert finished == [8, 8, 8]
    resumed = profile(model, [x], output_dir=tmp_path, verbose=False)  # what is recorded holds
    assert same(resumed, whole)
    assert resumed.fingerprint == whole.fingerprint
    assert finished == [8, 8, 8, 8, 8, 4]
    assert same(profile(model, [x], output_dir=tmp_path, verbose=False), whole)
    assert len(finished) == 6


@torch.no_grad()
def half_the_memory(model: torch.nn.Module, x: torch.Tensor) -> int:
    """A cap under which eight samples can't advance together."""
    pieces = open_run(model, [x], Options(batch_size=8, rounding="nearest")).pieces
    return pieces.fixed_bytes() + (pieces.chunk_bytes() or 0) // 2


def test_a_run_goes_on_in_the_pieces_it_began_with(tmp_path: Path) -> None:
    model, x = data()
    many = {"batch_size": 8, "rounding": "nearest", "verbose": False}
    little = half_the_memory(model, x)
    profile(model, [x], num_samples=16, max_memory=little, output_dir=tmp_path, **many)
    pieces = checkpoint.read_progress(tmp_path / checkpoint.PROGRESS_FILE)[0]["pieces"]
    assert len(pieces) == 1
    assert pieces[0][0] < 8
    plan = plan_run(model, [x], output_dir=tmp_path, **many)
    assert (plan.together, plan.stack) == tuple(pieces[0])
    assert plan_run(model, [x], num_samples=16, output_dir=tmp_path, **many).notes == ()  # nothing is left
    resumed = profile(model, [x], output_dir=tmp_path, **many)  # with memory for all eight at once
    assert same(resumed, profile(model, [x], max_memory=little, **many))
    assert [line for line in resumed.info["warnings"] if "memory" in line] == [
        f"goes on as it began, {pieces[0][0]} samples and 3 perturbations at a time (memory would allow 8 and 3)"
    ]
    assert checkpoint.read_progress(tmp_path / checkpoint.PROGRESS_FILE)[0]["pieces"] == pieces


def test_a_run_that_goes_on_with_less_memory_says_so(tmp_path: Path) -> None:
    model, x = data()
    many = {"batch_size": 8, "rounding": "nearest", "verbose": False}
    profile(model, [x], num_samples=16, output_dir=tmp_path, **many)
    little = half_the_memory(model, x)
    resumed = profile(model, [x], max_memory=little, output_dir=tmp_path, **many)
    (tmp_path / "file").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # as readable as any file
    assert any("samples and perturbations at a time were 8 and 3, then" in line for line in resumed.info["warnings"])
    again = profile(model, [x[:40]], num_samples=40, max_memory=little, output_dir=tmp_path / "again", **many)
    assert not any("at a time were" in line for line in again.info["warnings"])
    whole = profile(model, [x], **many)
    assert np.allclose(resumed.interaction, whole.interaction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [16, 32])
def test_pieces_that_an_allocation_made_smaller_stay_so(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory once, in the third chunk; interrupted before and after it."""
    model, x = data()
    many = {"batch_size": 8, "rounding": "nearest", "verbose": False}
    whole = run.Run._sums

    def run_with_shortage(first: int, **arguments: Any) -> Sensitivity:
        chunk = first - 1

        def sums(self: run.Run, name: str, batch: torch.Tensor, *rest: Any) -> Any:
            nonlocal chunk
            chunk += len(batch) == 8
            if chunk == 2 and len(batch) == 8:
                raise torch.OutOfMemoryError("out of memory")
            return whole(self, name, batch, *rest)

        monkeypatch.setattr(run.Run, "_sums", sums)
        return profile(model, [x], **many, **arguments)

    wanted = run_with_shortage(0)
    run_with_shortage(0, num_samples=stop, output_dir=tmp_path)
    resumed = run_with_shortage(stop // 8, output_dir=tmp_path)
    assert same(resumed, wanted)
    assert checkpoint.read_progress(tmp_path / checkpoint.PROGRESS_FILE)[0]["pieces"] == [[8, 3], [4, 3]]
    assert any("were 8 and 3, then 4 and 3" in line for line in resumed.info["warnings"])


@under_both_roundings
def test_more_samples_later_equal_the_longer_run(how: dict[str, Any], tmp_path: Path, finished: list[int]) -> None:
    model, x = data()
    longer = profile(model, [x], batch_size=8, verbose=False, **how)
    first = profile(model, [x], num_samples=20, batch_size=8, output_dir=tmp_path, verbose=False, **how)
    assert first.num_samples == 20
    finished.clear()
    assert same(profile(model, [x], output_dir=tmp_path, verbose=False), longer)
    assert finished == [8, 8, 8, 4]  # 16 are there, the half chunk behind them is measured again as a whole one
    with pytest.raises(clado.CladoError, match="44 samples are more than the 20 asked for"):
        profile(model, [x], num_samples=20, output_dir=tmp_path, verbose=False)


@pytest.mark.parametrize("estimator", ["logit", "exact"])
def test_merged_parts_equal_the_whole(estimator: str, tmp_path: Path) -> None:
    model, x = data()
    x = x[:25]

    def run(part: torch.Tensor) -> Sensitivity:
        exact = {"batch_size": 8, "precision": "float64", "rounding": "nearest", "verbose": False}
        return profile(model, [part], estimator=estimator, **exact)

    whole, parts = run(x), [run(x[:8]), run(x[8:9]), run(x[9:])]
    merged = Sensitivity.merge(parts)
    # Sums of doubles in another order: rounding of the means, and of their squares under a root.
    np.testing.assert_allclose(merged.delta_loss, whole.delta_loss, rtol=1e-12)
    scale = np.abs(whole.interaction).max()
    np.testing.assert_allclose(merged.interaction, whole.interaction, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(merged.stderr, whole.stderr, rtol=1e-9, atol=1e-12 * scale)
    assert merged.num_samples == 25
    assert merged.fingerprint == whole.fingerprint
    assert np.array_equal(merged.sample_digests, whole.sample_digests)
    assert same(Sensitivity.load(merged.save(tmp_path)), merged)
    with pytest.raises(clado.CladoError, match="8 samples in common"):
        Sensitivity.merge([parts[0], whole])
    other = profile(model, [x[:8]], estimator=estimator, bits=(2, 4), rounding="nearest", verbose=False)
    with pytest.raises(clado.CladoError, match="the same candidates"):
        Sensitivity.merge([parts[0], other])
    with pytest.raises(clado.CladoError, match="at least one"):
        Sensitivity.merge([])


@under_both_roundings
def test_full_disk_is_one_line_and_keeps_finished_chunks(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = data()
    write, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > 2:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(clado.CladoError, match="output_dir must have space left"):
        profile(model, [x], batch_size=8, output_dir=tmp_path, verbose=False, **how)
    kept = [path.name for path in tmp_path.iterdir() if not path.name.startswith("rounded-")]
    assert kept == ["progress.safetensors"]
    assert checkpoint.read_progress(tmp_path / kept[0])[1].samples == 16
    monkeypatch.undo()
    whole = profile(model, [x], batch_size=8, verbose=False, **how)
    assert same(profile(model, [x], output_dir=tmp_path, verbose=False), whole)


@pytest.mark.parametrize("bits", [(2, 4, 8), (4, 8)])
def test_a_second_run_on_the_same_directory_is_refused_while_the_first_goes_on(
    bits: tuple[int, ...], tmp_path: Path
) -> None:
    """Other settings or the same; the first one's half-written file stays, and it ends as if nothing had been."""
    model, x = data()
    lines: list[str] = []
    half = tmp_path / "run" / ".progress.safetensors.0123abcd"

    def batches() -> Iterator[torch.Tensor]:
        for k, part in enumerate(x.split(4)):
            if k == 8:
                half.write_bytes(b"on the way")
                for call in calls:
                    with pytest.raises(clado.CladoError, match="one process at a time") as caught:
                        call()
                    lines.append(str(caught.value))
                assert half.read_bytes() == b"on the way"
            yield part

    whole = profile(model, [x], batch_size=8, verbose=False)
    plan, given = clado.solve(whole, avg_bits=4.0), {"output_dir": tmp_path / "run", "verbose": False}
    calls = [
        lambda: profile(model, [x], bits, **given),
        lambda: clado.correct(model, [x], whole, avg_bits=4.0, **given),
        lambda: clado.finish(model, plan, [x], **given),
    ]
    assert same(profile(model, batches(), batch_size=8, output_dir=tmp_path / "run", verbose=False), whole)
    assert [line.partition(":")[0] for line in lines] == ["profile", "correct", "finish"]
    assert same(Sensitivity.load(tmp_path / "run"), whole)


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    model, x = data()
    plan_run(model, [x], output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    profile(model, [x[:16]], batch_size=8, output_dir=tmp_path, verbose=False)
    for name in (".progress.safetensors.0123abcd", ".lock", ".rounded-1.safetensors.89abcdef"):
        (tmp_path / name).write_bytes(b"another's")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    plan_run(model, [x], batch_size=8, output_dir=tmp_path)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    profile(
        model, [x], batch_size=8, output_dir=tmp_path, verbose=False
    )  # nobody holds it: what a killed run left goes
    assert not {".progress.safetensors.0123abcd", ".lock"} & set(os.listdir(tmp_path))
    assert ".rounded-1.safetensors.89abcdef" in os.listdir(tmp_path)  # another process may be writing it


def test_progress_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, x = data()
    profile(model, [x], batch_size=8, output_dir=tmp_path, verbose=False)
    (tmp_path / "sensitivity.safetensors").unlink()
    path = tmp_path / "progress.safetensors"
    with pytest.raises(clado.CladoError, match="whose data differ from sample 16 on"):
        profile(model, [torch.cat([x[:16], x[17:]])], output_dir=tmp_path, verbose=False)
    with pytest.raises(clado.CladoError, match=r"quantizer\.group_size differ \(-1 there, 0 here\)"):
        profile(model, [x], group_size=0, output_dir=tmp_path, verbose=False)
    with pytest.raises(clado.CladoError, match=r"batch_size differ \(8 there, 16 here\)"):
        profile(model, [x], batch_size=16, output_dir=tmp_path, verbose=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(clado.CladoError, match=r"whole progress\.safetensors, got a damaged"):
        profile(model, [x], output_dir=tmp_path, verbose=False)


class Shapes(torch.utils.data.Dataset):
    """Map-style data whose last sample is broken, or of another shape."""

    def __init__(self, x: torch.Tensor, last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.x, self.last = x, last

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.x[k] if k < len(self.x) - 1 else self.last(self.x[k])


def unreadable(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("cannot identify image file")


def wider(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 8, 9)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (unreadable, "must yield its batches, got ValueError at batch 3: cannot identify image file; finished chunks"),
        (wider, "must yield inputs of one shape"),
    ],
)
@under_both_roundings
def test_data_that_breaks_midway_is_one_line_and_keeps_finished_chunks(
    last: Callable[[torch.Tensor], torch.Tensor], message: str, how: dict[str, Any], tmp_path: Path
) -> None:
    model, x = data()
    loader = DataLoader(Shapes(x[:17], last), batch_size=1)
    with pytest.raises(clado.CladoError, match=message) as caught:
        profile(model, loader, batch_size=8, output_dir=tmp_path, verbose=False, **how)
    assert "\n" not in str(caught.value)
    assert checkpoint.read_progress(tmp_path / checkpoint.PROGRESS_FILE)[1].samples == 16


def test_a_candidate_without_a_finite_loss_is_dropped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = data()
    sound = profile(model, [x], verbose=False)
    make = variants

    def broken(*arguments: object) -> list[list[Variant]]:
        made = make(*arguments)  # type: ignore[arg-type]
        made[2][1] = Variant(torch.full_like(made[2][1].weight, float("inf")))
        return made

    monkeypatch.setattr("clado.profiling.open.variants", broken)
    found = profile(model, [x], verbose=False)
    name, bad = found.layers[2].name, 2 * 3 + 1
    assert found.info["dropped"] == [[name, 4]]
    assert f"dropped {name} at 4 bits" in found.info["warnings"][1]
    assert np.isnan(found.delta_loss[bad])
    assert np.isnan(found.interaction[bad]).all()
    kept = np.delete(np.arange(len(found.delta_loss)), bad)
    np.testing.assert_array_equal(found.matrix[np.ix_(kept, kept)], sound.matrix[np.ix_(kept, kept)])
    plan = clado.solve(found, avg_bits=4)
    assert plan.status == "optimal"
    assert plan.bits[name] != 4

"""Any number of ranks under torchrun gives what one gives, and a rank that dies leaves a run that goes on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clado.artifacts import Sensitivity
from clado.common import CladoError, digest
from clado.improve import correct
from clado.profiling import ESTIMATORS, Options, Ranks, open_run, profile
from clado.profiling.estimators import Passes
from clado.profiling.share import Share, split
from tests.models import tiny_vit

# argv: folder, [[estimator, samples], …], the last rank dies at so many chunks. Every rank saves what it was given.
SCRIPT = """
import json, os, sys, time, torch
torch.set_num_threads(1)
from clado.improve import correct
from clado.profiling import Run, profile, torchrun_group
from tests import exported_once
from tests.profiling.test_distributed import data, SETTINGS, STABLE, WISHES

exported_once.install()

folder, runs, last = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
with torchrun_group() as device:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    measure, count = Run._estimate, 0
    def dying(self, *arguments):
        global count
        count += 1
        if rank == world - 1 and count == last:
            while not os.path.exists(place + "/progress.safetensors"):  # torchrun ends rank 0 at once, even before it wrote
                time.sleep(0.01)
            os._exit(7)
        return measure(self, *arguments)
    Run._estimate = dying
    for estimator, samples in runs:
        place = f"{folder}/{estimator}{samples}"
        model, loader = data()
        if estimator == "correct":
            sens = profile(model, loader, num_samples=samples, output_dir=place, device=device, **SETTINGS)
            sens, plan = correct(model, loader, sens, num_samples=3, batch_size=2, output_dir=place, **WISHES)
            plan.save(f"{place}/rank{rank}.json")
        elif estimator == "compensated":
            how = dict(rounding=estimator, num_samples=samples, output_dir=place, device=device)
            sens = profile(model, loader, **how, **SETTINGS)
            plan = correct(model, loader, sens, num_samples=3, batch_size=2, **WISHES)[1]
            assert plan.rounded.by == sens.rounded.by == sens.provenance.rounding
            os.makedirs(f"{place}/rank{rank}")
            plan.save(f"{place}/rank{rank}/plan.json")
        elif estimator == "stable":
            model, loader = data(samples)
            sens = profile(model, loader, output_dir=place, device=device, **STABLE)
        else:
            sens = profile(
                model, loader, estimator=estimator, num_samples=samples, output_dir=place, device=device, **SETTINGS
            )
        sens.save(f"{place}/rank{rank}.safetensors")
"""
WISHES = {"avg_bits": 3.0, "solver": "heuristic", "verbose": False}
STABLE = {"until_stable": 0.9, "batch_size": 8, "rounding": "nearest", "verbose": False}
SETTINGS = {"batch_size": 4, "exact_samples": 5, "verbose": False}


def data(samples: int = 22) -> tuple[torch.nn.Module, torch.utils.data.DataLoader]:
    model, shape = tiny_vit()
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))
    return model, torch.utils.data.DataLoader(x, batch_size=5, shuffle=True)


def torchrun(folder: Path, ranks: int, runs: list[tuple[str, int]], last: int = -1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    (folder / "script.py").write_text(SCRIPT)
    command += [str(folder / "script.py"), str(folder), json.dumps(runs), str(last)]
    return subprocess.run(command, capture_output=True, timeout=900, check=False, text=True)


def one_rank(estimator: str, samples: int, output_dir: Path | None = None) -> Sensitivity:
    model, loader = data()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does
    try:
        if estimator == "correct":
            sens = profile(model, loader, num_samples=samples, **SETTINGS)  # type: ignore[arg-type]
            return correct(model, loader, sens, num_samples=3, batch_size=2, **WISHES)[0]
        if estimator == "stable":
            model, loader = data(samples)
            return profile(model, loader, **STABLE)  # type: ignore[arg-type]
        if estimator == "compensated":
            return profile(model, loader, rounding=estimator, num_samples=samples, **SETTINGS)  # type: ignore[arg-type]
        arguments = {"estimator": estimator, "num_samples": samples, "output_dir": output_dir}
        return profile(model, loader, **arguments, **SETTINGS)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


def check_same(got: Sensitivity, wanted: Sensitivity) -> None:
    """Sums of doubles of the same parts in the same order: the bits agree, 1e-12 is what is promised."""
    assert got.fingerprint == wanted.fingerprint
    for name in ("delta_loss", "interaction", "stderr", "sample_digests"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (
            2,
            [("logit", 3), ("corrected", 22), ("correct", 8), ("compensated", 8)],
        ),  # one chunk that both share, and six that each takes half of
        (3, [(name, 4) for name in ESTIMATORS]),  # one chunk, by three
        (5, [("stable", 160)]),  # ends after 12 chunks, in the third round
        (4, [("exact", 7)]),  # two chunks, each by two
    ],
)
def test_ranks_give_what_one_gives(tmp_path: Path, ranks: int, runs: list[tuple[str, int]]) -> None:
    done = torchrun(tmp_path, ranks, runs)
    assert done.returncode == 0, done.stderr
    for estimator, samples in runs:
        wanted = one_rank(estimator, samples)
        for rank in range(ranks):
            given = Sensitivity.load(tmp_path / f"{estimator}{samples}" / f"rank{rank}.safetensors")
            check_same(given, wanted)
            assert given.info["ranks"] == ranks
            assert given.provenance == wanted.provenance  # under compensated rounding with the digest of the very codes


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "samples", "last"), [(2, 22, 2), (3, 12, 3)])
def test_a_rank_that_dies_loses_one_round(tmp_path: Path, ranks: int, samples: int, last: int) -> None:
    """Two ranks share the chunks of 22 samples; three share those of 12, of which two are exact, by perturbations."""
    run = ("corrected", samples)
    assert torchrun(tmp_path, ranks, [run], last).returncode != 0
    folder = tmp_path / f"corrected{samples}"
    assert (folder / "progress.safetensors").exists()
    assert not (folder / "rank0.safetensors").exists()
    check_same(one_rank("corrected", samples, folder), one_rank("corrected", samples))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_split_covers_every_item_once_and_evenly(parts: int) -> None:
    costs = [7.0, 1.0, 1.0, 5.0, 3.0, 0.0, 2.0]
    lists = split(costs, parts)
    assert sorted(item for items in lists for item in items) == list(range(len(costs)))
    loads = [sum(costs[item] for item in items) for items in lists]
    assert max(loads) <= sum(costs) / parts + max(costs)  # Graham's bound
    assert all(items == sorted(items) and items for items in lists)
    assert split([1.0], 3) == [[0], [], []]


def test_fewer_chunks_than_ranks_are_shared() -> None:
    model, loader = data()
    options = Options(bits=(2, 4), estimator="exact", num_samples=20, batch_size=4, scale_steps=1)
    with torch.no_grad():
        run = open_run(model, loader, options)  # five chunks
    work, count = run.work, run.stream.expected
    assert [work.members(world, count, 0) for world in (1, 5, 10)] == [1, 1, 2]
    assert work.members(4, count, 0) > 1  # one rank each would leave three idle in the second of two rounds
    assert work.members(4, count, 12) > 1  # two chunks are left
    assert work.members(2, count, 16) == 2


def test_shared_work_is_that_of_the_longest_share() -> None:
    suffix = [1.0, 0.7, 0.4, 0.1]
    for estimator in ESTIMATORS:
        whole, half = (ESTIMATORS[estimator].work(Passes(1.0, suffix, [3] * 4, members)) for members in (1, 2))
        assert whole / 2 < half < whole
    assert Share().own(3, lambda: [1.0, 2.0, 3.0]) == [0, 1, 2]


def test_ranks_with_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(torch.device("cpu"))
    settings = {"weights": "ab", "batch_size": 4}
    ranks.check_same(settings)
    told = ranks.agree([int(digest(value)[:15], 16) for value in {**settings, "batch_size": 8}.values()])
    monkeypatch.setattr(ranks, "agree", lambda values: told)
    with pytest.raises(CladoError, match="ranks must have the same model, data and settings, got other batch_size"):
        ranks.check_same(settings)

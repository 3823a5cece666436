"""A run that ends when its plans stand: where it ends, that interruptions and ranks change nothing, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clado import CladoError, Layer
from clado.artifacts import Sensitivity, Stability
from clado.graph.capture import Captured, capture
from clado.profiling import PROGRESS_FILE, Checkpoint, Sums, plan_run, profile, read_progress
from clado.profiling.groups import GROUPS, Groups
from clado.profiling.stable import Rule, budgets, check_points
from clado.quant import Candidates, Scheme
from tests.models import tiny_vit

SIZE = 8
BUDGETS = (2.75, 3.5, 5.0)


def layers(count: int = 4) -> Candidates:
    own = [Layer(f"layer{i}", "linear", (4, 1 + i), 1) for i in range(count)]
    return Candidates.uniform(own, [Scheme.of(bits) for bits in (2, 4, 8)])


def chunk(loss: Tensor, pair: Tensor, samples: int = SIZE) -> Sums:
    """Sums over a chunk whose means are these."""
    sums = Sums.zeros(len(loss))
    sums.loss, sums.loss_squared = loss * samples, loss**2 * samples
    sums.pair, sums.pair_squared = pair.triu(1) * samples, pair.triu(1) ** 2 * samples
    sums.samples = samples
    return sums


def noisy(seed: int, noise: float, candidates: Candidates) -> Iterator[Sums]:
    """Chunks around a matrix whose losses fall fourfold with every bit, without end."""
    random = np.random.default_rng(seed)
    size = np.exp(random.normal(0, 0.7, len(candidates.layers)))[candidates.layer_of]
    size = size * 4.0 ** -(candidates.weight_bits - 2.0)
    scale = np.sqrt(np.outer(size, size))
    cross = random.normal(0, 0.2, scale.shape) * scale
    while True:
        loss = size * (1 + noise * random.normal(size=len(size)))
        pair = cross + noise * random.normal(size=scale.shape) * scale
        yield chunk(torch.from_numpy(loss), torch.from_numpy(pair))


def stop_of(rule: Rule, chunks: Iterator[Sums], most: int) -> int | None:
    """After how many chunks the rule ends a run; None: not within so many."""
    checkpoint = Checkpoint(None, {}, SIZE, len(rule.candidates), grouped=True)
    for count in range(1, most + 1):
        checkpoint.add(next(chunks), torch.arange(SIZE))
        if rule.stops(checkpoint):
            return count
    return None


def rule(tolerance: float, candidates: Candidates, limit: int = 4096) -> Rule:
    return Rule(tolerance, BUDGETS, candidates, SIZE, limit)


# ---- groups ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 150))
def test_groups_are_sums_of_as_many_neighbours(count: int) -> None:
    """Against a list of all chunks: the least power of two with which 16 groups hold them all."""
    candidates = layers(2)
    made = [sums for sums, _ in zip(noisy(0, 1.0, candidates), range(count), strict=False)]
    groups = Groups(len(candidates))
    for part in made:
        groups.add(part)
    each = next(2**k for k in range(20) if 2**k * GROUPS >= count)
    wanted = [made[a : a + each] for a in range(0, count, each)]
    assert (groups.each, len(groups.begun), groups.chunks) == (each, len(wanted), count)
    for found, parts in zip(groups.begun, wanted, strict=True):
        total = sum(part.pair.triu(1) + torch.diag(part.loss) for part in parts)
        assert torch.allclose(found, total, rtol=1e-12, atol=1e-12)
    again = Groups.of(groups.begun.clone(), count)
    for part in made[:3]:
        groups.add(part)
        again.add(part)
    assert torch.equal(groups.begun, again.begun)


def test_checks_are_made_where_groups_are_whole_and_even() -> None:
    assert check_points(512, 8) == [64, 96, 128, 192, 256, 384, 512]
    assert check_points(511, 8)[-1] == 384
    assert check_points(300, 1) == [64, 96, 128, 192, 256]
    assert check_points(2000, 100) == [800, 1200, 1600]
    assert check_points(63, 1) == check_points(63, 4) == []
    for point in check_points(4096, 1):
        groups = Groups(1)
        groups.chunks = point
        assert len(groups.begun) in (8, 12, 16)
        assert point % groups.each == 0


# ---- the rule ----------------------------------------------------------------------------------------------------


def test_without_noise_it_ends_as_soon_as_it_may() -> None:
    candidates = layers()
    assert stop_of(rule(1e-6, candidates), noisy(0, 0.0, candidates), 64) == 12  # of the checks at 8 and at 12 chunks


def test_with_nothing_but_noise_it_never_ends() -> None:
    candidates = layers()
    assert stop_of(rule(0.05, candidates), noisy(0, 30.0, candidates), 256) is None


def test_it_ends_at_the_same_place_again_and_sooner_where_less_is_asked_for() -> None:
    candidates = layers()
    stops = [stop_of(rule(tolerance, candidates), noisy(1, 0.5, candidates), 512) for tolerance in (0.4, 0.1, 0.1)]
    assert stops[1] == stops[2]
    assert stops[0] is not None
    assert stops[1] is not None
    assert 12 <= stops[0] < stops[1]


def test_one_lucky_check_is_not_enough() -> None:
    candidates = layers()
    own = rule(0.1, candidates)
    checkpoint = Checkpoint(None, {}, SIZE, len(candidates), grouped=True)
    stops = []
    for part, _ in zip(noisy(1, 0.5, candidates), range(64), strict=False):
        checkpoint.add(part, torch.arange(SIZE))
        stops.append(own.stops(checkpoint))
    good = {check["samples"] // SIZE: max(check["regrets"]) <= 0.1 for check in checkpoint.checks}
    assert list(good) == [8, 12, 16, 24, 32, 48, 64]
    assert True in good.values()
    assert False in good.values()
    twice = [later for first, later in pairwise(good) if good[first] and good[later]]
    assert [count for count, stop in enumerate(stops, 1) if stop] == twice


def test_what_is_lost_where_it_ended_is_below_the_tolerance() -> None:
    """Looking often and ending at the first good sight does not undo the bound: at least 90 % of the plans stand."""
    from tests.solver.test_regret import choices, loss

    candidates, kept, lost = layers(), [], []
    own, noise = rule(0.3, candidates), 1.0
    for seed in range(40):
        parts, total = noisy(seed, noise, candidates), Sums.zeros(len(candidates))
        truth = next(noisy(seed, 0.0, candidates))
        count = stop_of(own, parts, 64)
        if count is None:
            continue
        parts = noisy(seed, noise, candidates)
        for _ in range(count):
            total += next(parts)
        mean, true = (
            np.where(candidates.same_layer, 0.0, s.pair.numpy() / s.samples) + np.diag(s.loss.numpy() / s.samples)
            for s in (total, truth)
        )
        for limit in own.avg_bits:
            allowed = choices(candidates, limit)
            chosen = min(allowed, key=lambda c: loss(mean, c))
            regret = loss(true, chosen) - min(loss(true, c) for c in allowed)
            lost.append(regret > 1e-12)
            kept.append(regret <= 0.3 * max(abs(loss(mean, chosen)), 0.1 * np.diag(mean)[chosen].sum()))
    assert len(kept) >= 60
    assert np.mean(lost) > 0.05  # it did end before the best plans were known
    assert np.mean(kept) >= 0.9


def test_a_candidate_whose_loss_is_not_finite_is_left_out() -> None:
    """It would be dropped from the matrix; the others decide. Without any candidate of a layer the run never ends."""
    candidates = layers()

    def broken(rows: list[int]) -> Iterator[Sums]:
        for sums in noisy(0, 0.0, candidates):
            sums.loss[rows] = torch.inf
            sums.pair[:, rows] = torch.nan
            yield sums

    assert stop_of(rule(1e-6, candidates), broken([1]), 64) == 12
    assert stop_of(rule(1e-6, candidates), broken([3, 4, 5]), 64) is None


def test_budgets_lie_between_least_and_most() -> None:
    assert budgets(None, layers()) == (2.75, 3.5, 5.0)
    own = [Layer("a", "linear", (4, 4), 1), Layer("b", "linear", (4, 12), 1)]
    ragged = Candidates(tuple(own), ((Scheme.of(4),), (Scheme.of(2), Scheme.of(8))))
    assert budgets(None, ragged) == (2.5 + 4.5 / 8, 2.5 + 4.5 / 4, 2.5 + 4.5 / 2)


# ---- runs --------------------------------------------------------------------------------------------------------


@cache
def data() -> tuple[torch.nn.Module, Tensor]:
    model, shape = tiny_vit()
    return model, torch.randn(200, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One torch.export for all runs of the same model: it takes longer than the runs."""
    monkeypatch.setattr("clado.graph.open.capture", lambda model, example, *rest: captured(model.head.weight.dtype))


@cache
def captured(dtype: torch.dtype) -> Captured:
    model, x = data()
    return capture(deepcopy(model).to(dtype), x[:2].to(dtype))


def run(loader: Any = None, **given: Any) -> Sensitivity:
    model, x = data()
    how = {
        "batch_size": 8,
        "rounding": "nearest",
        "avg_bits": BUDGETS,
        "until_stable": 0.5,
        "verbose": False,
        **given,
    }
    if how["until_stable"] is None:
        del how["avg_bits"]
    return profile(model, [x] if loader is None else loader, **how)


def same(one: Sensitivity, other: Sensitivity) -> bool:
    names = ("delta_loss", "interaction", "stderr", "sample_digests")
    return (
        all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names) and one.fingerprint == other.fingerprint
    )


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks that were measured, in order."""
    sizes: list[int] = []
    add = Checkpoint.add

    def noting(self: Checkpoint, part: Sums, digests: Tensor) -> None:
        sizes.append(len(digests))
        add(self, part, digests)

    monkeypatch.setattr(Checkpoint, "add", noting)
    return sizes


@pytest.mark.parametrize("estimator", ["logit", "diagonal", "gradient"])
def test_it_is_the_run_of_as_many_samples(estimator: str, tmp_path: Path) -> None:
    sens = run(estimator=estimator, output_dir=tmp_path)
    found = sens.provenance.stability
    assert found is not None
    assert found.reached
    assert found.samples == sens.num_samples < 200
    assert found.regret <= 0.5
    assert (found.limit, found.avg_bits, found.tolerance) == (200, BUDGETS, 0.5)
    assert same(sens, run(estimator=estimator, num_samples=sens.num_samples, until_stable=None))
    assert not any("ended" in line for line in sens.notes["warnings"])
    assert Sensitivity.load(tmp_path).provenance == sens.provenance
    assert str(found).startswith(
        f"stable after {sens.num_samples} of 200 samples: the plans of 2.75, 3.5, 5 bits are within "
    )
    assert sens.info["stability"]["samples"] == sens.num_samples


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("after", [60, 64, 68, 92, 96])
def test_interrupted_it_ends_at_the_same_place(after: int, rounding: str, tmp_path: Path) -> None:
    """Before, at and after a check; the check itself is made again where it was not kept."""

    def breaking() -> Iterator[Tensor]:
        yield from data()[1][:after].split(4)
        raise OSError("the disk with the images is gone")

    how = {"rounding": rounding, **({"moment_samples": 16} if rounding == "compensated" else {})}
    whole = run(**how)
    assert whole.num_samples == 96
    if after < 96:
        with pytest.raises(CladoError, match="images is gone"):
            run(breaking(), output_dir=tmp_path, **how)
        assert not (tmp_path / "sensitivity.safetensors").exists()
    resumed = run(breaking() if after == 96 else None, output_dir=tmp_path, **how)
    assert same(resumed, whole)
    found, wanted = resumed.provenance.stability, whole.provenance.stability
    assert found is not None
    assert wanted is not None
    assert replace(found, limit=wanted.limit) == wanted  # how long a generator is nobody knows


def test_a_run_that_ended_is_loaded_and_goes_on_where_more_is_asked_for(tmp_path: Path, added: list[int]) -> None:
    first = run(output_dir=tmp_path, until_stable=0.9)
    assert len(added) == first.num_samples // 8
    assert same(run(output_dir=tmp_path, until_stable=0.9), first)
    assert len(added) == first.num_samples // 8  # loaded
    strict = run(output_dir=tmp_path, until_stable=1e-6)
    found = strict.provenance.stability
    assert found is not None
    assert not found.reached
    assert (strict.num_samples, found.samples) == (200, 192)  # the last check
    assert len(added) == 25
    assert same(strict, run(until_stable=None))
    assert str(found).startswith("not stable after 192 samples: the plans of 2.75, 3.5, 5 bits may be ")
    again = run(output_dir=tmp_path, until_stable=None)
    assert same(again, strict)
    assert len(added) == 25 + 25  # of the plain run: the directory is loaded


def test_it_may_end_before_the_samples_that_decided_the_rounding(tmp_path: Path) -> None:
    how = {"rounding": "compensated", "moment_samples": 160, "output_dir": tmp_path}
    first = run(**how)
    assert first.num_samples < 160 == first.provenance.rounding.samples
    assert same(run(**how), first)
    longer = run(**how, until_stable=None)
    assert longer.num_samples == 200
    assert same(longer, run(rounding="compensated", moment_samples=160, until_stable=None))


def test_it_is_prolonged_without_and_then_with_it_again(tmp_path: Path) -> None:
    first = run(output_dir=tmp_path, until_stable=0.9)
    longer = run(output_dir=tmp_path, num_samples=144, until_stable=None)
    assert longer.provenance.stability is None
    assert longer.num_samples == 144 > first.num_samples
    assert same(longer, run(num_samples=144, until_stable=None))
    last = run(output_dir=tmp_path, until_stable=0.9)  # 128 went by unseen: 192 is one check, and no second one follows
    assert last.num_samples == 200
    assert last.provenance.stability is not None
    assert last.provenance.stability.samples == 192


def test_another_tolerance_on_the_same_samples_is_said_anew(tmp_path: Path) -> None:
    strict = run(output_dir=tmp_path, num_samples=192, until_stable=1e-6)
    assert not strict.provenance.stability.reached
    loose = run(output_dir=tmp_path, num_samples=192, until_stable=0.9)
    assert loose.provenance.stability.reached
    assert loose.provenance.stability.samples == 192
    assert same(strict, loose)
    assert Sensitivity.load(tmp_path).provenance == loose.provenance


def test_without_a_directory_and_with_a_short_last_chunk(tmp_path: Path) -> None:
    x = data()[1]
    short = run([x[:100]], until_stable=1e-6)
    assert short.num_samples == 100
    assert short.provenance.stability.samples == 96
    assert any("the data ended after 100 of 1024 samples" in line for line in short.notes["warnings"])
    assert same(run(until_stable=0.5), run(until_stable=0.5, output_dir=tmp_path))


def test_chunks_are_a_64th_at_most_where_no_size_is_given(tmp_path: Path) -> None:
    assert run([data()[1][:100]], until_stable=0.9, batch_size=None, num_samples=64 * 3).notes["batch_size"] == 1
    assert run([data()[1]], batch_size=None, num_samples=200, until_stable=None).notes["batch_size"] > 3


def test_it_is_said_before_what_it_takes(tmp_path: Path) -> None:
    model, x = data()
    how = {"batch_size": 8, "rounding": "nearest"}
    plain, plan = plan_run(model, [x], **how), plan_run(model, [x], until_stable=0.1, **how)
    count = plan.candidates
    assert plan.group_bytes == 8 * GROUPS * count**2
    assert plan.disk_bytes - plain.disk_bytes == 2 * plan.group_bytes
    assert plan.fixed_bytes - plain.fixed_bytes == plan.group_bytes
    assert re.search(r"^groups +\d.* MiB of memory and on disk$", str(plan), re.M)
    assert "groups" not in str(plain)
    run(output_dir=tmp_path)
    sizes = (tmp_path / PROGRESS_FILE).stat().st_size
    assert sizes < plan.disk_bytes


def test_merged_matrices_do_not_claim_it() -> None:
    x = data()[1]
    one, other = run([x[:104]]), run([x[104:]])
    assert one.provenance.stability is not None
    assert Sensitivity.merge([one, other]).provenance.stability is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"until_stable": 0}, "profile: until_stable must lie between 0 and 1, got 0"),
        ({"until_stable": "yes"}, "profile: until_stable must lie between 0 and 1, got 'yes'"),
        ({"avg_bits": 3.0}, "profile: avg_bits must hold positive numbers, got 3.0"),
        ({"avg_bits": []}, "profile: avg_bits must hold positive numbers, got []"),
        ({"avg_bits": (3, -1)}, "profile: avg_bits must hold positive numbers, got (3, -1)"),
        ({"avg_bits": (3, 1.5)}, "profile: avg_bits must be at least 2, which the layers take, got 1.5"),
        (
            {"estimator": "corrected"},
            "profile: estimator must be one of diagonal, additive, gradient, exact with until_stable",
        ),
        (
            {"num_samples": 90},
            "profile: num_samples must be at least 96 with until_stable and chunks of 8 (two checks, of 8 chunks or more), got",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CladoError, match=re.escape(message)) as error:
        run(output_dir=tmp_path, **given)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_budgets_without_it_are_refused() -> None:
    model, x = data()
    with pytest.raises(CladoError, match=r"^profile: avg_bits must be left out without until_stable, got \(3.0,\)"):
        profile(model, [x], avg_bits=(3.0,))


def test_a_run_that_began_without_it_is_refused(tmp_path: Path) -> None:
    model, x = data()
    run(output_dir=tmp_path, num_samples=64, until_stable=None)
    before = read_progress(tmp_path / PROGRESS_FILE)[1].samples
    with pytest.raises(CladoError, match="until_stable must be given from a run's first sample on, got 64 samples of"):
        run(output_dir=tmp_path)
    with pytest.raises(CladoError, match="until_stable must be given"):
        plan_run(model, [x], until_stable=0.1, output_dir=tmp_path, rounding="nearest")
    assert read_progress(tmp_path / PROGRESS_FILE)[1].samples == before
    assert run(output_dir=tmp_path, until_stable=None).num_samples == 200


def test_stability_is_kept_as_json_and_damage_is_one_line() -> None:
    found = Stability(0.05, (2.5, 3.0), (0.01, 0.044), 192, 512, True)
    assert Stability.from_json({**vars(found), "avg_bits": [2.5, 3.0]}) == found
    assert Stability.from_json(None) is None
    assert (
        str(found) == "stable after 192 of 512 samples: the plans of 2.5, 3 bits are within 4.4 % of the best (2 s.e.)"
    )
    none = Stability(0.05, (3.0,), (), 0, 50, False)
    assert str(none) == "not stable: too few samples to compare the plans of 3 bits"
    for damaged in ([], {"tolerance": 1}, {**vars(found), "more": 1}, {**vars(found), "regrets": ["a"]}):
        with pytest.raises(CladoError, match="stability: file must say what was found of the plans, got"):
            Stability.from_json(damaged)

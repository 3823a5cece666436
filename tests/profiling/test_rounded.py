"""Compensated rounding from a profile to an export: the weights that were measured are kept, and are those that ship."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor, nn

import clado
from clado import CladoError, Plan, Sensitivity
from clado.artifacts import read_rounded, uncorrected
from clado.common import weights_digest
from clado.deploy import pack_model, verify
from clado.graph import capture
from clado.profiling import checkpoint, plan_run, rounded_weights
from clado.quant import Variant, variants
from tests.models import lively
from tests.record.nets import Unexportable

SHAPE, COUNT = (1, 6, 6), 26
HOW: dict[str, Any] = {
    "rounding": "compensated",
    "quantize_ends": True,
    "scale_steps": 9,
    "batch_size": 8,
    "verbose": False,
}


class Net(nn.Module):
    """A grouped, a depthwise and a 1×1 convolution, and one weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.depthwise, self.point = nn.Conv2d(6, 6, 3, padding="same", groups=6), nn.Conv2d(6, 8, 1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = torch.relu(self.point(self.depthwise(x))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return lively(Net()).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(1))


CAPTURED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One torch.export for all runs of the same model and options: it takes longer than the runs."""
    export = capture.capture

    def kept(model: nn.Module, example: Any, *rest: Any) -> Any:
        dtype = next(model.parameters()).dtype
        key = (weights_digest(model), dtype, repr(rest))
        if type(model) is not Net or any(m._forward_pre_hooks for m in model.modules()):
            return export(model, example, *rest)
        if key not in CAPTURED:
            CAPTURED[key] = export(deepcopy(model), example, *rest)
        return CAPTURED[key]

    monkeypatch.setattr("clado.graph.open.capture", kept)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of every pass that sums moments."""
    counts: list[int] = []
    whole = rounded_weights.second_moments

    def counting(runner: Any, stream: Any, reader: Any, samples: int, *rest: Any) -> Any:
        counts.append(samples)
        return whole(runner, stream, reader, samples, *rest)

    monkeypatch.setattr(rounded_weights, "second_moments", counting)
    return counts


@pytest.fixture(scope="module")
def finished(model: nn.Module, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    clado.profile(model, [x], output_dir=folder, **HOW)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run's directory."""
    return shutil.copytree(finished, tmp_path / "run")


def rounded_file(folder: Path) -> Path:
    (path,) = folder.glob("rounded-*.safetensors")
    return path


def same(one: Sensitivity, other: Sensitivity) -> bool:
    arrays = all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("delta_loss", "interaction", "stderr"))
    return arrays and one.provenance == other.provenance and one.fingerprint == other.fingerprint


def values_of(sens: Sensitivity, model: nn.Module) -> list[list[Tensor]]:
    made = variants(model, sens.candidates, sens.quantizer, torch.device("cpu"), torch.float32, sens.rounded)
    return [[variant.weight for variant in own] for own in made]


def test_what_was_measured_is_what_ships(
    model: nn.Module, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the directory alone, without the data that decided the rounding, bit for bit."""
    handed: list[list[list[Variant]]] = []

    def noting(*arguments: Any) -> Any:
        handed.append(variants(*arguments))
        return handed[-1]

    for place in ("clado.profiling.open.variants", "clado.improve.refiner.variants"):
        monkeypatch.setattr(place, noting)
    run = tmp_path / "run"
    made = clado.profile(model, [x], output_dir=run, **HOW)
    (measured,) = handed
    nearest = variants(model, made.candidates, made.quantizer, torch.device("cpu"), torch.float32)
    assert all(
        not torch.equal(a.weight, b.weight)
        for own, near in zip(measured, nearest, strict=True)
        for a, b in zip(own, near, strict=True)
    )

    sens = Sensitivity.load(run)
    assert same(sens, made)
    assert sens.provenance.rounding is not None
    assert sens.provenance.rounding.samples == COUNT
    clado.solve(sens, avg_bits=4, time_limit=2).save(run)
    plan = Plan.load(run)
    assert plan.rounding == sens.provenance.rounding
    fresh = deepcopy(model)
    applied = clado.apply(fresh, plan)
    for layer, own in zip(sens.layers, measured, strict=True):
        wanted = own[sens.index(layer.name, plan.schemes[layer.name]) - sens.index(layer.name, 2)]
        for name in layer.names:
            assert torch.equal(applied.get_parameter(name), wanted.weight)

    labelled = (x, torch.arange(COUNT) % 5)
    outputs = applied(x)
    assert torch.equal(pack_model(fresh, plan)(x), outputs)
    others = [clado.solve(sens, avg_bits=b, time_limit=2) for b in (3, 6)]
    score = clado.evaluate(applied, [labelled])
    best = clado.rerank(fresh, [labelled], [plan, *others], loss="cross_entropy")
    assert best.rounding == plan.rounding
    assert clado.evaluate(clado.apply(fresh, best), [labelled]).loss <= score.loss + 1e-9

    handed.clear()
    corrected, chosen = clado.correct(fresh, [x], sens, avg_bits=4, time_limit=2, verbose=False)
    refined = clado.refine(fresh, [x], sens, plan, avg_bits=4, rounds=1, time_limit=2, verbose=False)
    assert len(handed) == 2
    for again in handed:
        assert all(
            torch.equal(a.weight, b.weight)
            for own, w in zip(again, measured, strict=True)
            for a, b in zip(own, w, strict=True)
        )
    for later in (corrected.rounded, chosen.rounded, refined.rounded):
        assert later is not None
        assert later.by == plan.rounding

    for format, options in (("safetensors", {}), ("compressed-tensors", {}), ("onnx", {"example": x[:2]})):
        if format != "safetensors":
            pytest.importorskip({"onnx": "onnxruntime"}.get(format, "compressed_tensors"))
        clado.export(fresh, plan, tmp_path / format, format, **options)
        verify(fresh, plan, tmp_path / format, format, **options)
    blank = Net().eval()  # other weights: an export has all
    for packed in (False, True):
        assert torch.equal(clado.load(tmp_path / "safetensors", blank, packed=packed)(x), outputs)
    with pytest.raises(CladoError, match=r"^load: folder must hold the weights by compensated .* got no rounded-"):
        clado.apply(model, Plan.load(tmp_path / "safetensors"))  # the codes lie in the export's own files


def breaking(x: Tensor, after: int) -> Iterator[Tensor]:
    yield from x[:after].split(4)
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_its_weights(
    model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int], finished: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        clado.profile(model, breaking(x, 20), num_samples=COUNT, moment_samples=12, output_dir=tmp_path, **HOW)
    assert passes == [12]
    kept = rounded_file(tmp_path).read_bytes()
    resumed = clado.profile(model, [x], output_dir=tmp_path, **HOW)  # the recorded number of samples holds
    assert passes == [12]
    assert rounded_file(tmp_path).read_bytes() == kept
    assert same(resumed, clado.profile(model, [x], moment_samples=12, **HOW))
    assert passes == [12, 12]
    assert same(clado.profile(model, [x], moment_samples=12, output_dir=tmp_path, **HOW), resumed)
    assert passes == [12, 12]  # from the file, the number being its own
    assert not same(resumed, Sensitivity.load(finished))  # by all samples the weights are others
    with pytest.raises(CladoError, match=r"moment_samples differ \(12 there, 8 here\)"):
        clado.profile(model, [x], moment_samples=8, output_dir=tmp_path, **HOW)
    with pytest.raises(CladoError, match="data differ from sample 0 on"):
        clado.profile(model, [x.flip(0)], output_dir=tmp_path, **HOW)


def test_a_run_that_died_before_its_first_chunk_makes_the_weights_again(
    model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            clado.profile(model, [x], output_dir=tmp_path, **HOW)
    assert list(tmp_path.iterdir()) == []
    assert same(clado.profile(model, [x], output_dir=tmp_path, **HOW), Sensitivity.load(finished))
    assert passes == [COUNT, COUNT]


def test_other_samples_of_which_only_moments_were_made_are_refused(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """Eight samples were measured and are the same; the weights were decided by twelve more."""
    with pytest.raises(KeyboardInterrupt):
        clado.profile(
            model, breaking(x, 20), num_samples=24, moment_samples=20, output_dir=tmp_path, **HOW | {"batch_size": 16}
        )
    other = torch.cat([x[:17], -x[17:]])
    with pytest.raises(CladoError, match="data differ from sample 17 on"):
        clado.profile(model, [other], output_dir=tmp_path, **HOW | {"batch_size": None})


def test_more_samples_later_keep_the_weights(model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]) -> None:
    short = clado.profile(model, [x], num_samples=10, output_dir=tmp_path, **HOW)
    before = rounded_file(tmp_path).read_bytes()
    longer = clado.profile(model, [x], output_dir=tmp_path, **HOW)
    assert passes == [10]
    assert longer.num_samples == COUNT
    assert longer.provenance.rounding == short.provenance.rounding
    assert rounded_file(tmp_path).read_bytes() == before
    assert same(longer, clado.profile(model, [x], moment_samples=10, **HOW))


def test_a_run_that_began_with_nearest_rounding_goes_on_so(
    model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]
) -> None:
    nearest, unsaid = HOW | {"rounding": "nearest"}, HOW | {"rounding": None}
    clado.profile(model, [x], num_samples=10, output_dir=tmp_path, **nearest)
    assert plan_run(model, [x], output_dir=tmp_path, **unsaid).moment_bytes == 0
    longer = clado.profile(model, [x], output_dir=tmp_path, **unsaid)
    assert same(longer, clado.profile(model, [x], **nearest))
    differ = r"^profile: output_dir must .* whose rounding differ \(nearest there, compensated here\)$"
    for asked in ({"rounding": "compensated"}, {"moment_samples": 4}):
        with pytest.raises(CladoError, match=differ):
            clado.profile(model, [x], output_dir=tmp_path, **unsaid | asked)
    (tmp_path / checkpoint.PROGRESS_FILE).unlink()
    with pytest.raises(CladoError, match=r"sensitivity\.safetensors of another run in .*, of nearest rounding$"):
        clado.profile(model, [x], output_dir=tmp_path, **HOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sensitivity.safetensors"]
    assert passes == [COUNT]
    alone = clado.profile(model, [x[:4]], **HOW)
    with pytest.raises(CladoError, match=r"later ones with rounding nearest, or --rounding nearest, as the first\)"):
        Sensitivity.merge([longer, alone])


def test_runs_over_other_samples_take_the_weights_of_the_first_and_merge(
    model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]
) -> None:
    exact = HOW | {"precision": "float64"}
    one = clado.profile(model, [x[:11]], output_dir=tmp_path / "a", **exact)
    alone = clado.profile(model, [x[11:]], output_dir=tmp_path / "alone", **exact)
    with pytest.raises(
        CladoError, match=r"^merge: parts must have the same rounded weights .*--rounded-as.* got compensated .* after "
    ):
        Sensitivity.merge([one, alone])
    passes.clear()
    two = clado.profile(model, iter([x[11:]]), rounded_as=tmp_path / "a", output_dir=tmp_path / "b", **exact)
    assert passes == []
    again = clado.profile(
        model, [x[11:]], num_samples=15, output_dir=tmp_path / "b", **exact
    )  # what it began with stays
    assert same(again, two)
    assert rounded_file(tmp_path / "b").read_bytes() == rounded_file(tmp_path / "a").read_bytes()
    merged = Sensitivity.merge([one, two])
    whole = clado.profile(model, [x], moment_samples=11, **exact)
    # Sums of doubles in another order.
    np.testing.assert_allclose(merged.delta_loss, whole.delta_loss, rtol=1e-12)
    np.testing.assert_allclose(
        merged.interaction, whole.interaction, rtol=1e-12, atol=1e-12 * np.abs(whole.interaction).max()
    )
    assert merged.fingerprint == whole.fingerprint
    merged.save(tmp_path / "merged")
    for part in ("a", "b"):
        shutil.rmtree(tmp_path / part)
    loaded = Sensitivity.load(tmp_path / "merged")
    assert loaded.rounded is not None
    assert loaded.rounded.by == one.provenance.rounding


def many(count: int = 48, seed: int = 2) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_other_data_decide_the_rounding(model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]) -> None:
    others = many()
    found = clado.profile(model, [x], moment_data=others.split(7), output_dir=tmp_path / "run", **HOW)
    assert passes == [48]
    clado.profile(model, [others], cross_validated=False, output_dir=tmp_path / "others", **HOW)
    assert same(found, clado.profile(model, [x], rounded_as=tmp_path / "others", **HOW))
    assert found.num_samples == COUNT
    assert found.provenance.rounding is not None
    assert found.provenance.rounding.samples == 48
    short = clado.profile(model, [x[:10]], moment_data=[others], output_dir=tmp_path / "short", **HOW)
    assert short.provenance.rounding == found.provenance.rounding
    assert same(clado.profile(model, [x], output_dir=tmp_path / "short", **HOW), found)  # what it began with stays
    few = clado.profile(model, [x], moment_data=iter([others]), moment_samples=9, **HOW)
    assert few.provenance.rounding is not None
    assert few.provenance.rounding.samples == 9


def factors_of(sens: Sensitivity) -> Any:
    """``[V]``, as the file of the weights has them."""
    assert sens.rounded is not None
    known = sens.rounded.optimism
    return np.array([known[layer.name][scheme.number.name] for layer, scheme in sens.candidates.pairs])


def excess(weight: Tensor, by: list[Tensor], moments: list[Tensor]) -> float:
    """Root of the ratio by which the layer loss of two halves' weights rises on each other's samples, in float64."""
    errors = [(weight - own).double() for own in by]
    losses = [[float((e @ h.double() @ e.T).trace()) for h in moments] for e in errors]
    return max(1.0, (losses[0][1] + losses[1][0]) / (losses[0][0] + losses[1][1])) ** 0.5


def test_losses_are_corrected_for_what_the_rounding_fits(model: nn.Module, passes: list[int]) -> None:
    """By the layer loss of each half's weights on the inputs of the other half, which a hook sees."""
    x, how = many(47), HOW | {"precision": "float64"}  # cut between two passes of 16 samples
    found, plain = (clado.profile(model, [x], cross_validated=on, **how) for on in (None, False))
    assert passes == [47, 47]
    assert found.provenance.rounding == plain.provenance.rounding  # the weights that ship are the same
    assert found.rounded is not None
    assert plain.rounded is not None
    assert not plain.rounded.optimism
    assert "optimism" not in plain.notes
    assert " in the median, " in found.notes["optimism"]
    seen: list[Tensor] = []
    with model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0])), torch.no_grad():
        model(x)
    halves = [clado.profile(model, [part], cross_validated=False, **how) for part in (x[:16], x[16:])]
    moments = [part.T @ part for part in (seen[0][:16], seen[0][16:])]
    weight = model.head.weight.detach()
    head = [layer.name for layer in found.layers].index("head")
    for k, scheme in enumerate(found.candidates.schemes[head]):
        by = [own.rounded.of("head", scheme.number).values(torch.float32) for own in halves if own.rounded is not None]
        known = found.rounded.optimism["head"][scheme.number.name]
        # The second half's moments are a difference of float32 sums.
        assert known == pytest.approx(excess(weight, by, moments), rel=1e-3)
        v = found.candidates.starts[head] + k
        assert found.delta_loss[v] == pytest.approx(plain.delta_loss[v] * known, rel=1e-9)
    factors = factors_of(found)
    assert (factors >= 1).all()
    assert factors.max() > 1.05
    pairs = np.sqrt(np.outer(factors, factors))
    np.testing.assert_allclose(found.interaction, plain.interaction * pairs, rtol=1e-9)
    np.testing.assert_allclose(found.stderr, plain.stderr * pairs, rtol=1e-9)


def test_the_layers_alone_as_they_were_measured_are_a_plan_of_the_shortlist(model: nn.Module) -> None:
    x = many(47)
    found, plain = (clado.profile(model, [x], cross_validated=on, **HOW) for on in (None, False))
    again = uncorrected(found)
    assert again.notes.keys() == plain.notes.keys()
    for name in ("delta_loss", "interaction", "stderr"):
        np.testing.assert_allclose(getattr(again, name), getattr(plain, name), rtol=1e-12)
    assert uncorrected(plain) is plain
    assert found.rounded is not None
    factors = {name: dict.fromkeys(own, 30.0**k) for k, (name, own) in enumerate(found.rounded.optimism.items())}
    strong = replace(found, held=replace(found.rounded, optimism=factors))
    alone, other = (clado.solve(sens, objective="diagonal", avg_bits=3.5) for sens in (strong, uncorrected(strong)))
    assert alone.schemes != other.schemes
    short = {tuple(plan.schemes.values()): plan for plan in clado.shortlist(strong, avg_bits=3.5)}
    assert tuple(alone.schemes.values()) in short
    listed = short[tuple(other.schemes.values())]
    assert listed.objective == clado.given_plan(strong, listed.schemes, listed.objective_name).objective
    assert listed.bound <= listed.objective


def test_a_corrected_run_goes_on_and_keeps_its_factors(model: nn.Module, tmp_path: Path, passes: list[int]) -> None:
    x = many(64)
    whole = clado.profile(model, [x], moment_samples=48, **HOW)
    for chunks in (1, 7):
        folder = tmp_path / str(chunks)
        interrupted(chunks, model, x, folder, moment_samples=48)
        passes.clear()
        assert same(clado.profile(model, [x], output_dir=folder, **HOW), whole)
        assert passes == []
        assert read_rounded(rounded_file(folder)).optimism == whole.rounded.optimism
        with pytest.raises(CladoError, match="cross_validated must be as the run in output_dir began, got False after"):
            clado.profile(model, [x], cross_validated=False, output_dir=folder, **HOW)


def interrupted(chunks: int, model: nn.Module, x: Tensor, folder: Path, **how: Any) -> None:
    """A run that dies after so many chunks."""
    add, left = checkpoint.Checkpoint.add, iter(range(chunks))

    def dying(self: Any, *rest: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            clado.profile(model, [x], output_dir=folder, **HOW | how)


def test_losses_under_the_weights_of_another_run_are_corrected_as_asked(model: nn.Module, tmp_path: Path) -> None:
    x = many(48)
    first = clado.profile(model, [x], output_dir=tmp_path / "a", **HOW)
    same = clado.profile(model, [x], rounded_as=tmp_path / "a", **HOW)
    plain = [
        clado.profile(model, [x], rounded_as=tmp_path / "a", output_dir=tmp_path / "b", cross_validated=False, **HOW)
    ]
    plain.append(clado.profile(model, [x], cross_validated=False, **HOW))
    np.testing.assert_array_equal(same.delta_loss, first.delta_loss)
    np.testing.assert_array_equal(plain[0].delta_loss, plain[1].delta_loss)
    assert (first.delta_loss > plain[0].delta_loss).any()


def test_samples_that_decided_nothing_are_not_corrected(model: nn.Module, tmp_path: Path, passes: list[int]) -> None:
    x = many(72)
    how = HOW | {"precision": "float64"}
    first = clado.profile(model, [x[:48]], output_dir=tmp_path / "a", **how)
    longer = clado.profile(model, [x], output_dir=tmp_path / "a", **how)
    other = clado.profile(model, [x[48:]], rounded_as=tmp_path / "a", output_dir=tmp_path / "b", **how)
    assert passes == [48]
    raw = clado.profile(model, [x[48:]], rounded_as=tmp_path / "a", **how).delta_loss
    np.testing.assert_array_equal(other.delta_loss, raw)
    factors = factors_of(first)
    expected = 72 / (48 / factors + 24)  # of 72 samples 48 decided
    plain = clado.profile(model, [x], moment_samples=48, cross_validated=False, **how)
    np.testing.assert_allclose(longer.delta_loss, plain.delta_loss * expected, rtol=1e-9)
    for parts in ([first, other], [other, first]):
        merged = Sensitivity.merge(parts)
        np.testing.assert_allclose(merged.delta_loss, (48 * first.delta_loss + 24 * raw) / 72, rtol=1e-9)
        assert merged.notes["optimism"] == longer.notes["optimism"] != first.notes["optimism"]


def test_what_cannot_be_validated_is_one_line(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    clado.profile(model, [many()], cross_validated=False, output_dir=tmp_path / "run", **HOW)
    nearest, asked = {"rounding": "nearest"}, {"cross_validated": True}
    cases: list[tuple[dict[str, Any], str]] = [
        (asked, "cross_validated must have 32 samples at least, got 26"),
        ({"cross_validated": 1}, "cross_validated must be True or False, got 1"),
        (asked | {"output_dir": tmp_path / "run"}, "be as the run in output_dir began, got True after False"),
        (asked | {"moment_data": [x]}, "moment_data must be left out with cross_validated, got both"),
        ({"moment_data": [x], "rounded_as": tmp_path}, "moment_data must be left out with rounded_as, got both"),
        ({"moment_data": [x]} | nearest, "moment_data must be left out with nearest rounding, got list"),
        (asked | nearest, "cross_validated must be left out with nearest rounding, got True"),
        ({"moment_data": []}, "moment_data must yield at least one sample, got none"),
        ({"moment_data": [x[:, :, :3]]}, "moment_data must yield inputs of one shape"),
        (
            {"moment_data": [x * torch.nan]},
            "moment_data must yield finite numbers, got NaN or infinity among samples 0",
        ),
    ]
    for changed, message in cases:
        with pytest.raises(CladoError, match=message) as caught:
            clado.profile(model, [x], **HOW | changed)
        assert "\n" not in str(caught.value)


def test_the_weights_of_a_run_that_is_under_way(model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        clado.profile(model, breaking(x, 20), moment_samples=12, output_dir=tmp_path, **HOW)
    assert not (tmp_path / "sensitivity.safetensors").exists()
    other = clado.profile(model, [x[20:]], rounded_as=tmp_path, **HOW)
    assert other.provenance.rounding is not None
    assert other.provenance.rounding.samples == 12
    assert passes == [12]


def test_what_cannot_be_taken_over_is_one_line(model: nn.Module, x: Tensor, run: Path, tmp_path: Path) -> None:
    nearest = HOW | {"rounding": "nearest"}
    clado.profile(model, [x], output_dir=tmp_path / "nearest", **nearest)
    torch.manual_seed(7)
    cases: list[tuple[nn.Module, Path, dict[str, Any], str]] = [
        (model, tmp_path / "nearest", {}, "rounded_as must be a run whose weights were rounded by data"),
        (model, tmp_path / "nowhere", {}, "path must be a sensitivity file or a run directory"),
        (Net().eval(), run, {}, "rounded_as must be a run of the same model, got .* other weights"),
        (model, run, {"group_size": 2}, "rounded_as must be a run of the same quantizer"),
        (model, run, {"bits": (2, 3)}, r"rounded_as must be a run of the same candidates, got .*no W3A16 of stem"),
        (model, run, {"rounding": "nearest"}, "rounded_as must be left out with nearest rounding"),
    ]
    for net, folder, changed, message in cases:
        with pytest.raises(CladoError, match=message) as caught:
            clado.profile(net, [x], rounded_as=folder, output_dir=tmp_path / "new", **HOW | changed)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()
    with pytest.raises(CladoError, match="moment_samples must be left out with nearest rounding, got 4"):
        clado.profile(model, [x], moment_samples=4, **nearest)
    with pytest.raises(CladoError, match="rounding must be one of nearest, compensated, got 'best'"):
        clado.profile(model, [x], **HOW | {"rounding": "best"})


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def foreign(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path)


def flipped(path: Path) -> None:
    """A byte of the last codes."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["clado.rounded"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        change(header)
        save_file(tensors, path, {"clado.rounded": json.dumps(header)})

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "folder must hold the weights by compensated rounding that it was made with, got no rounded-"),
        (damaged, "file must hold whole rounded weights"),
        (lambda path: path.write_bytes(b""), "file must hold whole rounded weights"),
        (foreign, "file must hold rounded weights of clado"),
        (flipped, "file must hold what was written, got damaged data"),
        (edited(lambda header: header.update(schema=9)), "schema must be 1, got 9"),
        (edited(lambda header: header.update(by=None)), "file must say how weights were rounded"),
        (edited(lambda header: header.update(by={"rounding": 3})), "file must say rounding, samples, data and digest"),
        (edited(lambda header: header.pop("shapes")), "file must hold whole rounded weights"),
        (edited(lambda header: header["shapes"].pop("first")), "file must hold weights of its layers in known formats"),
        (edited(lambda header: header["shapes"].update(first=[8, 9])), "file must hold first as int. whole"),
        (edited(lambda header: header.update(quantizer={"group_size": "x"})), "must"),
        (edited(lambda header: header.update(damped=[])), "file must hold whole rounded weights"),
    ],
)
def test_a_file_of_weights_that_is_not_whole_is_one_line(
    spoil: Callable[[Path], Any], message: str, run: Path, model: nn.Module
) -> None:
    clado.solve(Sensitivity.load(run), avg_bits=4, time_limit=2).save(run)
    spoil(rounded_file(run))
    for use in (
        lambda: clado.apply(model, Plan.load(run)),
        lambda: Sensitivity.load(run).rounded,
    ):
        with pytest.raises(CladoError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_file_of_other_weights_under_this_name_is_refused(
    run: Path, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    clado.profile(model, [x], output_dir=tmp_path / "other", **HOW | {"moment_samples": 9})
    shutil.copy(rounded_file(tmp_path / "other"), rounded_file(run))
    with pytest.raises(CladoError, match=r"^load: rounded weights must be those of rounded-.*, got others$"):
        _ = Sensitivity.load(run).rounded
    with pytest.raises(CladoError, match="rounded differ"):
        clado.profile(model, [x], output_dir=run, **HOW)


def test_a_plan_is_refused_for_other_weights_and_without_its_file(run: Path, model: nn.Module) -> None:
    plan = clado.solve(Sensitivity.load(run), avg_bits=4, time_limit=2)
    torch.manual_seed(9)
    with pytest.raises(CladoError, match="model must be the one the plan was made for, got other weights"):
        clado.apply(Net().eval(), plan)
    alone = Plan.from_json(plan.to_json())
    assert alone == plan
    for use in (clado.apply, pack_model, lambda m, p: clado.export(m, p, run / "out")):
        with pytest.raises(CladoError, match=r"^plan: rounded weights must be at hand, got none; load the plan from "):
            use(model, alone)
    assert not (run / "out").exists()
    other = replace(plan, schemes=dict.fromkeys(plan.schemes, "W3A16"))
    with pytest.raises(CladoError, match="plan must have rounded weights for every layer's scheme, got none for"):
        clado.apply(model, other)
    unknown = replace(plan, fingerprint={})
    assert torch.equal(clado.apply(model, unknown).head.weight, clado.apply(model, plan).head.weight)
    with pytest.raises(CladoError, match=r"weights that were rounded from the model's, got another model's"):
        clado.apply(model, replace(plan, fingerprint={**plan.fingerprint, "weights": "other"}))


def test_a_plan_that_replaces_another_takes_its_file_away(
    run: Path, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    """Unless a matrix or another plan in the folder has the same weights."""
    sens = Sensitivity.load(run)
    plan, name = clado.solve(sens, avg_bits=4, time_limit=2), rounded_file(run).name
    other = clado.solve(clado.profile(model, [x], **HOW | {"moment_samples": 9}), avg_bits=4, time_limit=2)
    folder = tmp_path / "plans"
    plan.save(folder)
    assert {path.name for path in folder.iterdir()} == {"plan.json", name}
    plan.save(folder / "second.json")
    other.save(folder)
    assert len(list(folder.glob("rounded-*"))) == 2
    assert clado.apply(model, Plan.load(folder / "second.json")) is not None
    other.save(folder / "second.json")
    assert rounded_file(folder).name != name
    assert Plan.load(folder).rounded is not None
    nearest = replace(other, rounding=None, held=None)
    nearest.save(folder)
    assert Plan.load(folder / "second.json").rounded is not None
    nearest.save(folder / "second.json")
    assert list(folder.glob("rounded-*")) == []

    plan.save(run)
    other.save(run)
    nearest.save(run)
    assert rounded_file(run).name == name  # the matrix has it
    assert Sensitivity.load(run).rounded is not None


def test_a_dry_run_says_what_moments_take_and_writes_nothing(
    model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int], finished: Path
) -> None:
    folder = tmp_path / "run"
    planned = plan_run(model, [x], output_dir=folder, **HOW)
    sides = {"stem": (1, 9), "grouped": (2, 18), "depthwise": (6, 9), "point": (1, 6), "first": (1, 8), "head": (1, 8)}
    assert planned.moment_bytes == 4 * sum(groups * inputs**2 for groups, inputs in sides.values())
    assert "moments      0.0 MiB before the run" in str(planned)
    assert not folder.exists()
    assert passes == []
    plain = plan_run(model, [x], **HOW | {"rounding": "nearest"})
    assert plain.moment_bytes == 0
    assert "moments" not in str(plain)
    assert planned.forward_equivalents > plain.forward_equivalents + COUNT
    assert plan_run(model, [x], **HOW | {"precision": "float64"}).moment_bytes == 2 * planned.moment_bytes
    taken = sum(path.stat().st_size for path in finished.iterdir())
    assert taken <= planned.disk_bytes


def test_a_dry_run_of_a_run_that_goes_on(model: nn.Module, x: Tensor, tmp_path: Path, passes: list[int]) -> None:
    clado.profile(model, [x], num_samples=16, output_dir=tmp_path, **HOW)
    planned = plan_run(model, [x], output_dir=tmp_path, **HOW)
    assert planned.finished == 16
    assert planned.moment_bytes == 0  # the weights are there
    assert plan_run(model, [x], rounded_as=tmp_path, **HOW).moment_bytes == 0
    rounded_file(tmp_path).unlink()
    planned = plan_run(model, [x], output_dir=tmp_path, **HOW)
    assert planned.finished == 16
    assert planned.moment_bytes > 0
    assert passes == [16]


def test_data_that_decides_nothing_is_one_line_and_nothing_is_written(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(CladoError, match=r"^profile: data_loader must yield at least one sample, got none$"):
        clado.profile(model, [], output_dir=folder, **HOW)
    bad = x.clone()
    bad[9, 0, 2, 2] = torch.nan
    with pytest.raises(CladoError, match=r"^profile: data_loader must yield finite numbers, .* samples 0\.\.15$"):
        clado.profile(model, [bad], output_dir=folder, **HOW)
    assert not folder.exists()


def test_one_sample_is_enough_for_moments(model: nn.Module, x: Tensor) -> None:
    sens = clado.profile(model, [x[:1]], **HOW)
    assert np.isfinite(sens.delta_loss).all()
    assert sens.provenance.rounding is not None
    assert sens.provenance.rounding.samples == 1


def test_a_model_without_a_graph_has_the_same_weights(model: nn.Module, x: Tensor, finished: Path) -> None:
    """Padding "same", groups and the shared weight included; float32 sums of another pass may differ in their last bits."""
    sens, wrapped = Sensitivity.load(finished), Unexportable(model).eval()
    whole = clado.profile(wrapped, [x], **HOW)
    assert "whole forwards" in whole.info["warnings"][0]
    for own, wanted in zip(values_of(whole, wrapped), values_of(sens, model), strict=True):
        for got, value in zip(own, wanted, strict=True):
            step = value.abs().max() / 2
            assert (got - value).abs().max() <= 2 * step
            assert ((got - value).abs() > 1e-4 * step).float().mean() < 0.1
    plan = clado.solve(whole, avg_bits=4, time_limit=2)
    assert torch.isfinite(clado.apply(wrapped, plan)(x)).all()


def test_layers_whose_candidates_differ(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    schemes = {"stem": ("W8A16",), "point": ("W2A16", "W3A16", "W5A16"), "*": ("W4A16", "W8A16")}
    sens = clado.profile(model, [x], schemes=schemes, output_dir=tmp_path, **HOW)
    plan = clado.solve(Sensitivity.load(tmp_path), avg_bits=5, time_limit=2)
    assert sens.rounded is not None
    assert len(sens.rounded.packed) == 1 + 3 + 4 * 2
    applied = clado.apply(model, plan)
    values = dict(zip((layer.name for layer in sens.layers), values_of(sens, model), strict=True))
    assert torch.equal(applied.get_parameter("stem.weight"), values["stem"][0])


def test_rounded_inputs_of_layers_decide_too(model: nn.Module, x: Tensor, tmp_path: Path, finished: Path) -> None:
    sens = clado.profile(model, [x], act_bits=3, output_dir=tmp_path, **HOW)
    assert sens.rounded is not None
    assert sens.rounded.by.digest != Sensitivity.load(finished).provenance.rounding.digest  # type: ignore[union-attr]
    plan = clado.solve(Sensitivity.load(tmp_path), avg_bits=4, time_limit=2)
    assert torch.isfinite(clado.apply(model, plan)(x)).all()
    best = clado.rerank(model, [x], [plan, clado.solve(sens, avg_bits=6, time_limit=2)])
    assert best.rounding == plan.rounding


class Tokens(nn.Module):
    """Whole numbers in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(torch.relu(self.body(self.table(tokens))))}


def stepped(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def off(output: Any, batch: Any) -> Tensor:
    return (output["out"] - batch[1]).square().mean((1, 2))


def test_a_loss_and_a_step_of_ones_own_on_whole_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Tokens().eval()
    batch = (torch.randint(0, 7, (9, 4)), torch.randn(9, 4, 3))
    how = HOW | {"loss_func": off, "forward_step": stepped, "estimator": "exact"}
    planned = plan_run(net, [batch], **how)
    assert planned.moment_bytes == 2 * 36 * 4
    sens = clado.profile(net, [batch], output_dir=tmp_path, **how)
    assert np.isfinite(sens.matrix).all()
    assert sens.rounded is not None
    tokens = net.table(batch[0])
    assert sens.rounded.damped == {"body": 0.003, "head": 0.003}
    assert tokens.shape == (9, 4, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(dtype: torch.dtype, model: nn.Module, x: Tensor) -> None:
    half = deepcopy(model).to(dtype)
    sens = clado.profile(half, [x], **HOW)
    plan = clado.solve(sens, avg_bits=4, time_limit=2)
    applied = clado.apply(half, plan)
    assert applied.head.weight.dtype == dtype
    assert sens.rounded is not None
    wanted = sens.rounded.of("head", plan.chosen["head"].number).values(dtype)
    assert torch.equal(applied.head.weight, wanted)


@pytest.mark.parametrize("settings", [{"group_size": 3}, {"group_size": 0}, {"symmetric": False, "group_size": 4}])
def test_every_kind_of_scales_comes_back(settings: dict[str, Any], model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    sens = clado.profile(model, [x], output_dir=tmp_path, **HOW | settings)
    found = read_rounded(rounded_file(tmp_path))
    assert sens.rounded is not None
    assert found.by == sens.rounded.by
    for layer, schemes in zip(sens.layers, sens.candidates.schemes, strict=True):
        for scheme in schemes:
            one, other = (held.of(layer.name, scheme.number) for held in (found, sens.rounded))
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scale, other.scale)


def test_files_of_schema_2_are_of_nearest_rounding(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    plain = clado.profile(model, [x], output_dir=tmp_path, **HOW | {"rounding": "nearest"})
    plan = clado.solve(plain, avg_bits=4, time_limit=2)
    matrix = tmp_path / "sensitivity.safetensors"
    with safe_open(matrix, framework="numpy") as file:
        header = json.loads(file.metadata()["clado.sensitivity"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    header["schema"] = 2
    del header["provenance"]["rounding"]
    save_arrays(arrays, matrix, {"clado.sensitivity": json.dumps(header)})
    data = json.loads(plan.to_json())
    assert data["schema"] == 3
    data["schema"] = 2
    del data["rounding"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    old, older = Sensitivity.load(tmp_path), Plan.load(tmp_path)
    assert same(old, plain)
    assert (old.rounded, older.rounded) == (None, None)
    assert older == plan
    applied = clado.apply(model, older)
    assert torch.equal(applied.head.weight, clado.apply(model, plan).head.weight)
    assert same(clado.profile(model, [x], output_dir=tmp_path, **HOW | {"rounding": None}), plain)


def test_the_directory_holds_nothing_else(finished: Path) -> None:
    names = sorted(os.listdir(finished))
    assert names == ["progress.safetensors", rounded_file(finished).name, "sensitivity.safetensors"]

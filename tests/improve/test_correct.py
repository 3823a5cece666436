"""Correction: the plan's pairs are those of the exact estimator, and the plan that is found stands."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.profiling import Run
from tests.models import small_cnn, tiny_vit

BITS, COUNT = (2, 3, 4, 8), 24
NEAREST: dict[str, Any] = {"rounding": "nearest", "verbose": False}  # fewer samples have the same weights


@functools.cache
def made(build: Any) -> tuple[nn.Module, Tensor, clado.Sensitivity, clado.Sensitivity]:
    """Model, samples, and the matrix by the closed form and by exact pairs."""
    model, shape = build()
    x = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(3))
    both = [
        clado.profile(model, [x], BITS, estimator=name, num_samples=COUNT, **NEAREST) for name in ("logit", "exact")
    ]
    return model, x, both[0], both[1]


def pairs(sens: clado.Sensitivity) -> np.ndarray:
    """Mask of the corrected pairs, both ways round."""
    mask = np.zeros_like(sens.interaction, dtype=bool)
    for v, w in sens.info["corrected_pairs"]:
        mask[v, w] = mask[w, v] = True
    return mask


@pytest.mark.parametrize("build", [tiny_vit, small_cnn])
def test_pairs_of_the_plan_are_exact_and_it_stands(build: Any) -> None:
    model, x, logit, exact = made(build)
    sens, plan = clado.correct(model, [x], logit, num_samples=COUNT, rounds=30, avg_bits=3.0, verbose=False)
    assert plan.info["stands"]
    assert len(plan.info["correct"]) == (4 if build is tiny_vit else 2)
    taken = np.flatnonzero(sens.one_hot(plan.bits))
    mask = pairs(sens)
    assert mask[np.ix_(taken, taken)].sum() == len(taken) * (len(taken) - 1)
    # Forwards of fewer streams at once round differently in float32.
    scale = np.abs(exact.interaction).max()
    for name in ("interaction", "stderr"):
        got, wanted, before = (getattr(s, name) for s in (sens, exact, logit))
        np.testing.assert_allclose(got[mask], wanted[mask], rtol=1e-4, atol=1e-5 * scale)
        assert np.abs(before[mask] - wanted[mask]).max() > 1e-3 * scale  # the closed form was off
        np.testing.assert_array_equal(got[~mask], before[~mask])
    assert plan.objective == pytest.approx(exact.predict(plan.bits), rel=1e-4)
    assert plan.bits == clado.solve(sens, avg_bits=3.0).bits
    assert plan.info["correct"][-1]["pairs"] == 0
    count = len(sens.layers)
    assert plan.info["correct"][0]["pairs"] == count * (count - 1) // 2
    assert sum(row["pairs"] for row in plan.info["correct"]) == mask.sum() // 2


def test_few_samples_correct_the_mean_of_all_and_what_is_measured_is_not_measured_again() -> None:
    model, x, logit, _ = made(tiny_vit)
    sens, plan = clado.correct(model, [x], logit, num_samples=6, rounds=30, avg_bits=3.0, verbose=False)
    few = [clado.profile(model, [x[:6]], BITS, estimator=e, num_samples=6, **NEAREST) for e in ("logit", "exact")]
    mask = pairs(sens)
    residual = few[1].interaction - few[0].interaction
    scale = np.abs(logit.interaction).max()
    np.testing.assert_allclose(
        sens.interaction[mask], (logit.interaction + residual)[mask], rtol=1e-4, atol=1e-5 * scale
    )
    assert (sens.stderr[mask] > 0).all()
    again, same = clado.correct(model, [x], sens, num_samples=6, avg_bits=3.0, verbose=False)
    assert same.bits == plan.bits
    assert [row["pairs"] for row in same.info["correct"]] == [0]
    np.testing.assert_array_equal(again.interaction, sens.interaction)


def test_at_the_last_round_the_best_measured_plan_is_taken() -> None:
    model, x, logit, _ = made(tiny_vit)
    sens, plan = clado.correct(model, [x], logit, num_samples=6, rounds=1, avg_bits=3.0, verbose=False)
    first = clado.solve(logit, avg_bits=3.0)
    assert not plan.info["stands"]  # seeds and sizes are fixed: one round does not do here
    assert plan.bits == first.bits
    assert plan.status == "feasible"
    assert plan.objective == pytest.approx(sens.predict(first.bits))
    assert plan.bound <= plan.objective


def test_interrupted_rounds_go_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, logit, _ = made(tiny_vit)
    wishes: dict[str, Any] = {"num_samples": 8, "batch_size": 2, "rounds": 30, "avg_bits": 3.0, "verbose": False}
    whole, plan = clado.correct(model, [x], logit, **wishes)
    measure, count = Run._estimate, 0

    def dying(self: Run, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in (3, 8):
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(Run, "_estimate", dying)
    logit.save(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            clado.correct(model, [x], clado.Sensitivity.load(tmp_path), output_dir=tmp_path, **wishes)
    assert (tmp_path / "pairs").exists()
    sens, found = clado.correct(model, [x], clado.Sensitivity.load(tmp_path), output_dir=tmp_path, **wishes)
    assert [row["pairs"] for row in plan.info["correct"]][1:] == [13, 0]  # two rounds of four chunks
    assert count == 10  # finished chunks are not measured again
    assert found.bits == plan.bits
    for name in ("interaction", "stderr"):
        np.testing.assert_array_equal(getattr(sens, name), getattr(whole, name))
    assert not (tmp_path / "pairs").exists()
    np.testing.assert_array_equal(clado.Sensitivity.load(tmp_path).interaction, sens.interaction)


def test_cross_entropy_and_rounded_activations() -> None:
    model, shape = tiny_vit()
    x, labels = torch.randn(8, *shape), torch.arange(8) % 10
    data = [(x, labels)]
    common: dict[str, Any] = {"loss": "cross_entropy", "act_bits": 4, "ignore": ["blocks.0.*"], "verbose": False}
    logit, exact = (clado.profile(model, data, BITS, num_samples=8, estimator=e, **common) for e in ("logit", "exact"))
    sens, _ = clado.correct(model, data, logit, num_samples=8, avg_bits=4.0, rounds=1, verbose=False)
    mask = pairs(sens)
    scale = np.abs(exact.interaction).max()
    np.testing.assert_allclose(sens.interaction[mask], exact.interaction[mask], rtol=1e-3, atol=1e-4 * scale)


def test_bad_arguments() -> None:
    model, x, logit, exact = made(tiny_vit)
    other, _ = small_cnn()
    for arguments, message in (
        ((model, [x], exact), "sens must be measured by the additive estimator, got exact"),
        ((model, [x + 1], logit), "data_loader must yield 3 samples of sens, got 3 samples, 3 of them others"),
        ((model, [x[:2]], logit), "data_loader must yield 3 samples of sens, got 2 samples, 0 of them others"),
        ((other, [x], logit), "correct: model must have a weight"),
    ):
        with pytest.raises(clado.CladoError, match=message):
            clado.correct(*arguments, avg_bits=3.0, verbose=False)
    for wrong in ({"rounds": 0}, {"num_samples": 1}, {"num_samples": COUNT + 1}):
        with pytest.raises(clado.CladoError, match="correct: "):
            clado.correct(model, [x], logit, avg_bits=3.0, verbose=False, **wrong)
    with pytest.raises(clado.CladoError, match="budget must be given"):
        clado.correct(model, [x], logit, verbose=False)
    sens, _ = clado.correct(model, [x], logit, avg_bits=3.0, rounds=1, verbose=False)
    with pytest.raises(clado.CladoError, match="be merged before"):
        clado.Sensitivity.merge([sens])

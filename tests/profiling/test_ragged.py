"""Layers with different lists of candidates, from the profile to an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import clado
from clado.artifacts import Sensitivity
from tests.models import tiny_vit

SCHEMES = {"*qkv": ("W2A16", "W3A16", "W4A16", "W6A16", "W8A16"), "*proj": ("W4A16",), "*": ("W2A16", "W8A16")}


@pytest.mark.parametrize("estimator", ["diagonal", "logit", "gradient", "corrected", "exact"])
def test_entries_are_those_of_the_same_candidates_in_a_uniform_run(estimator: str, tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    settings = {"estimator": estimator, "scale_steps": 3, "batch_size": 4, "precision": "float64", "verbose": False}
    sens = clado.profile(model, [x], schemes=SCHEMES, output_dir=tmp_path, **settings)
    whole = clado.profile(model, [x], bits=range(2, 9), **settings)
    assert set(sens.candidates.counts) == {1, 2, 5}
    rows = [
        whole.index(sens.layers[k].name, scheme)
        for k, scheme in zip(sens.candidates.layer_of, sens.candidates.flat, strict=True)
    ]
    for got, wanted in (
        (sens.delta_loss, whole.delta_loss[rows]),
        (sens.interaction, whole.interaction[np.ix_(rows, rows)]),
        (sens.stderr, whole.stderr[np.ix_(rows, rows)]),
    ):
        # float64 throughout; stacks of another size multiply in another order
        assert np.abs(got - wanted).max() <= 1e-9 * np.abs(wanted).max()
    again = Sensitivity.load(tmp_path)
    assert again.candidates == sens.candidates
    assert np.array_equal(again.matrix, sens.matrix)


def test_the_whole_way(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(12, *shape, generator=torch.Generator().manual_seed(1))
    sens = clado.profile(model, [x], schemes=SCHEMES, scale_steps=3, verbose=False)
    planned = clado.plan_run(model, [x], schemes=SCHEMES, scale_steps=3)
    assert planned.candidates == sens.num_candidates
    sens, corrected = clado.correct(model, [x], sens, avg_bits=4, num_samples=4, verbose=False)
    assert len(sens.provenance.corrected_pairs) > 0
    plans = clado.shortlist(sens, avg_bits=4)
    chosen = clado.rerank(model, [x], [corrected, *plans])
    refined = clado.refine(model, [x], sens, chosen, rounds=1, avg_bits=4, verbose=False)
    for plan in (chosen, refined):
        assert all(sens.candidates.has(name, scheme) for name, scheme in plan.schemes.items())
        assert plan.avg_bits <= 4
    clado.export(model, refined, tmp_path / "out")
    loaded, applied = clado.load(tmp_path / "out", model).state_dict(), clado.apply(model, refined).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in applied.items())


def test_an_interrupted_ragged_run_goes_on(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    settings = {"schemes": SCHEMES, "scale_steps": 3, "batch_size": 2, "verbose": False}

    def broken() -> object:
        yield x[:4]
        raise RuntimeError("gone")

    with pytest.raises(clado.CladoError, match="gone"):
        clado.profile(model, broken(), output_dir=tmp_path, num_samples=8, **settings)
    sens = clado.profile(model, [x], output_dir=tmp_path, num_samples=8, **settings)
    whole = clado.profile(model, [x], num_samples=8, **settings)
    assert np.array_equal(sens.matrix, whole.matrix)
    with pytest.raises(clado.CladoError, match="output_dir must be new or hold the same run"):
        clado.profile(
            model, [x], output_dir=tmp_path, num_samples=8, **{**settings, "schemes": {"*": ("W2A16", "W8A16")}}
        )

"""Layers with 1 to 16 candidates each: every choice is tried, hundreds of times."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

import clado
from clado import CladoError
from clado.artifacts import Sensitivity
from clado.solver import LinearConstraint, read_latency

LABELS = [f"W{bits}A{inputs}" for bits in range(2, 9) for inputs in (4, 8, 16)]
PROGRAMS = 300


def ragged(seed: int) -> tuple[Sensitivity, dict[str, float]]:
    """A matrix over 1 to 4 layers of 1 to 16 candidates, and a budget between the least and the most."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    layers = [(f"layer{k}", draw.randint(1, 500)) for k in range(draw.randint(1, 4))]
    schemes = [draw.sample(LABELS, draw.randint(1, 16)) for _ in layers]
    schemes = [sorted(own, key=lambda label: (int(label[1]), int(label[3:]))) for own in schemes]
    owner = np.repeat(np.arange(len(layers)), [len(own) for own in schemes])
    matrix = numbers.normal(size=(len(owner),) * 2) * 0.3
    matrix = (matrix + matrix.T) / 2
    matrix[owner[:, None] == owner[None, :]] = 0
    np.fill_diagonal(matrix, np.abs(numbers.normal(size=len(owner))))
    sens = Sensitivity.from_matrix(matrix, layers, schemes=schemes)
    assert sens.candidates.counts == tuple(map(len, schemes))
    bits = sens.candidates.code_bits
    ends = [
        sum(part(bits[sens.candidates.block(k)]) for k in range(len(layers))) / sens.candidates.numel
        for part in (min, max)
    ]
    return sens, {"avg_bits": max(0.1, ends[0] + draw.random() * (ends[1] - ends[0]))}


def best(sens: Sensitivity, avg_bits: float) -> float:
    blocks = [range(*sens.candidates.block(k).indices(len(sens.candidates))) for k in range(len(sens.layers))]
    choices = np.array(list(itertools.product(*blocks)))
    fits = sens.candidates.code_bits[choices].sum(axis=1) <= avg_bits * sens.candidates.numel * (1 + 1e-12)
    held = choices[fits]
    return float(
        sum(sens.matrix[held[:, i], held[:, j]] for i in range(held.shape[1]) for j in range(held.shape[1])).min() / 2
    )


@pytest.mark.parametrize("first", range(0, PROGRAMS, 50))
def test_plans_are_those_of_trying_every_choice(first: int) -> None:
    for seed in range(first, first + 50):
        sens, budget = ragged(seed)
        plan = clado.solve(sens, **budget, time_limit=60)
        wanted = best(sens, budget["avg_bits"])
        assert plan.status == "optimal", seed
        assert plan.objective == pytest.approx(wanted, abs=1e-9), seed
        assert plan.bound <= wanted + 1e-9, seed
        assert sens.predict(plan.schemes) == pytest.approx(plan.objective, abs=1e-9)
        assert plan.usage["avg_bits"]["used"] <= budget["avg_bits"] * (1 + 1e-12)


def test_one_layer_of_many_candidates() -> None:
    labels = [f"W{bits}A{inputs}" for bits in range(2, 9) for inputs in range(10, 17)]
    loss = np.arange(len(labels), 0, -1.0)
    sens = Sensitivity.from_matrix(np.diag(2 * loss), [("a", 10), ("b", 5)][:1], schemes=[labels])
    plan = clado.solve(sens, avg_bits=5)
    assert plan.schemes == {"a": "W5A16"}
    assert plan.status == "optimal"


def test_pins_bans_groups_and_neighbours() -> None:
    sens = Sensitivity.from_matrix(
        np.diag([8.0, 4, 1, 6, 3, 9, 2]),
        [("a", 10), ("b", 10), ("c", 10)],
        schemes=[("W2A16", "W4A16", "W8A16"), (2, 8), (4, 8)],
    )
    assert clado.solve(sens, avg_bits=8, pin={"a": "W4A16"}, forbid={"b": 8}).schemes == {
        "a": "W4A16",
        "b": "W2A16",
        "c": "W8A16",
    }
    shared = clado.solve(sens, avg_bits=8, shared_layers=[("a", "b")])
    assert shared.bits == {"a": 8, "b": 8, "c": 8}
    assert clado.solve(sens, avg_bits=5, shared_layers=[("a", "b")]).bits == {"a": 2, "b": 2, "c": 8}
    with pytest.raises(clado.CladoError, match="shared_layers must have a scheme in common, got none for 2 of them"):
        clado.solve(
            Sensitivity.from_matrix(np.eye(2), [("a", 1), ("b", 1)], schemes=[(2,), (4,)]),
            avg_bits=8,
            shared_layers=[("a", "b")],
        )
    plans = clado.shortlist(sens, avg_bits=6, near=3)
    assert len({tuple(plan.schemes.items()) for plan in plans}) == len(plans) > 1
    with pytest.raises(clado.CladoError, match=r"bits must be one of \(2, 8\) for b, got 4"):
        clado.solve(sens, avg_bits=8, pin={"b": 4})
    front = clado.pareto(sens, avg_bits=(3, 5, 8))
    assert [plan.status for plan in front] == ["optimal"] * 3


def test_tables_go_by_scheme_or_by_bits(tmp_path: Path) -> None:
    """A label goes before bits, which stand for all schemes of so many."""
    sens = Sensitivity.from_matrix(
        np.diag([3.0, 2.0, 1.0, 0.5]), [("a", 100)], schemes=[("W4A8", "W4A16", "FP8", "W8A8")]
    )
    labels = [scheme.label for scheme in sens.candidates.flat]
    assert labels == ["W4A8", "W4A16", "FP8", "W8A8"]
    table = {"a": {4: 1.0, "W4A16": 2.0, 8: 3.0, "FP8": 2.5}}
    (tmp_path / "t.json").write_text(json.dumps(table))
    (tmp_path / "t.csv").write_text("layer,scheme,ms\na,4,1\na,W4A16,2\na,8,3\na,FP8,2.5\n")
    for given in (table, tmp_path / "t.json", tmp_path / "t.csv"):
        for limit, label in ((1.0, "W4A8"), (2.4, "W4A16"), (2.6, "FP8"), (3.0, "W8A8")):
            plan = clado.solve(sens, latency=given, latency_ms=limit)
            assert plan.schemes == {"a": label}
            assert plan.usage["latency_ms"]["used"] == pytest.approx(
                table["a"].get(label, table["a"].get(plan.bits["a"]))
            )
    with pytest.raises(CladoError, match="give every layer a time at every width or scheme, got none for W8A8 of a"):
        clado.solve(sens, latency={"a": {4: 1.0, "FP8": 2.5}}, latency_ms=3)
    changed = LinearConstraint("changed", {"a": {"W8A8": 1, "FP8": 1}}, 0)
    assert clado.solve(sens, constraints=[changed]).schemes == {"a": "W4A16"}
    (tmp_path / "bad.csv").write_text("layer,scheme,ms\na,W4A99,1\n")
    with pytest.raises(CladoError, match="path must be JSON"):
        read_latency(tmp_path / "bad.csv")

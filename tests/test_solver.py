"""solve against brute force on small instances; bounds are true; budgets are exact; bad input in one line."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

import clado
from clado.plan import Plan
from clado.sensitivity import Sensitivity, same_layer
from clado.solver import OBJECTIVES, objective_matrix
from clado.solver.problem import budget_unit, build, cost_row
from clado.solver.shift import convexify


def instance(layers: int, bits: tuple[int, ...], seed: int, noise: float = 0.3, scale: float = 1.0) -> Sensitivity:
    """Single losses that fall fourfold per bit, correlated interactions and noise, as reference experiments have them."""
    random = np.random.default_rng(seed)
    count = layers * len(bits)
    size = random.lognormal(0, 1, layers)
    loss = np.array([s * 4.0 ** (2 - b) * random.uniform(0.5, 1.5) for s in size for b in bits])
    factor = random.standard_normal((count, count // 2 + 1))
    spread = np.sqrt(np.outer(loss, loss))
    correlation = factor @ factor.T / np.sqrt(np.outer((factor**2).sum(1), (factor**2).sum(1)))
    error = random.standard_normal((count, count))
    omega = 0.5 * spread * correlation + noise * spread * (error + error.T) / 2
    omega[same_layer(layers, len(bits))] = 0
    matrix = (omega + np.diag(2 * loss)) * scale
    named = [(f"l{k}", int(random.integers(10, 1000))) for k in range(layers)]
    return Sensitivity.from_matrix(matrix, named, bits=bits, stderr=np.abs(error + error.T) * spread * 0.1 * scale)


def brute_force(sens: Sensitivity, matrix: NDArray, budgets: dict[str, float]) -> float:
    """The least ½xᵀGx within the budgets by trying everything; inf when nothing fits."""
    width, best = len(sens.bits), np.inf
    rows = {name: np.array(cost_row(sens, name)) / budget_unit(sens, name) for name in budgets}
    for choice in itertools.product(range(width), repeat=len(sens.layers)):
        index = np.array([k * width + m for k, m in enumerate(choice)])
        if all(row[index].sum() <= budgets[name] * (1 + 1e-12) for name, row in rows.items()):
            best = min(best, 0.5 * matrix[np.ix_(index, index)].sum())
    return best


@pytest.mark.parametrize("seed", range(24))
def test_equals_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    bits = [(2, 4, 8), (2, 3, 4, 8), (2, 8)][seed % 3]
    sens = instance(
        int(random.integers(1, 7)), bits, seed, noise=random.choice([0.1, 0.7]), scale=10.0 ** random.integers(-14, 15)
    )
    budgets = {"avg_bits": float(np.round(random.uniform(2, 6), 2))}
    if seed % 2:
        budgets["size_bytes"] = float(
            sum(sorted(cost_row(sens, "size_bytes"))[:: len(bits)]) + random.integers(0, 2000)
        )
    objective = OBJECTIVES[seed % 4]
    matrix = objective_matrix(sens, objective)
    wanted = brute_force(sens, matrix, budgets)
    least = brute_force(sens, matrix, {name: np.inf if name != "size_bytes" else budgets[name] for name in budgets})
    if wanted == np.inf and least == np.inf:
        with pytest.raises(clado.CladoError, match="size_bytes must be at least"):
            clado.solve(sens, **budgets, objective=objective)
        return
    plan = clado.solve(sens, **budgets, objective=objective, time_limit=30)
    if wanted == np.inf:
        assert plan.status == "infeasible"
        return
    size = 0.5 * np.abs(np.diag(matrix)).sum()
    assert plan.status == "optimal"
    assert plan.objective == pytest.approx(wanted, rel=1e-9, abs=1e-4 * size)
    assert plan.bound <= wanted + 1e-9 * size
    assert all(use["used"] <= use["limit"] * (1 + 1e-12) for use in plan.usage.values())


def test_the_shift_changes_no_plan_and_makes_the_program_convex() -> None:
    sens = instance(6, (2, 4, 8), 3, noise=0.7)
    problem = build(sens, sens.matrix, {"avg_bits": 4.0}, {}, {})
    convex = convexify(problem, 5.0)
    random = np.random.default_rng(0)
    for _ in range(50):
        choice = np.array([random.choice(m) for m in problem.members])
        y = convex.basis.T @ (np.isin(convex.candidates, choice) - convex.centre)
        value = 0.5 * (convex.factor @ y) @ (convex.factor @ y) + convex.linear @ y + convex.constant
        assert value == pytest.approx(problem.value(choice), rel=1e-9, abs=1e-9)


def test_budget_at_the_minimum_beyond_the_maximum_and_below() -> None:
    sens = instance(5, (2, 4, 8), 0)
    assert set(clado.solve(sens, avg_bits=2).bits.values()) == {2}
    free = clado.solve(sens, avg_bits=100)
    assert free.objective == pytest.approx(brute_force(sens, sens.matrix, {"avg_bits": 100}), rel=1e-6)
    least = sum(sorted(cost_row(sens, "size_bytes"))[0:0]) + sum(cost_row(sens, "size_bytes")[::3])
    assert clado.solve(sens, size_bytes=least).size_bytes == least
    with pytest.raises(clado.CladoError, match=r"solve: avg_bits must be at least 2, got 1\.5 \(0\.5 too low\)"):
        clado.solve(sens, avg_bits=1.5)
    with pytest.raises(clado.CladoError, match=f"size_bytes must be at least {least}, got {least - 1}"):
        clado.solve(sens, size_bytes=least - 1)


def test_size_mb_counts_what_export_writes() -> None:
    sens = instance(5, (2, 4, 8), 0)
    plan = clado.solve(sens, size_mb=0.001)
    assert plan.size_bytes <= 0.001 * 2**20
    assert plan.usage["size_mb"]["used"] == pytest.approx(plan.size_bytes / 2**20)


def test_jointly_impossible_budgets_are_proven_infeasible() -> None:
    """Two layers, two widths: each budget alone can be met, not both together."""
    layers = [
        clado.Layer("a", "linear", (1, 1000), 10, ("a.weight",)),
        clado.Layer("b", "linear", (1, 10), 1000, ("b.weight",)),
    ]
    sens = Sensitivity.from_matrix(np.diag([4.0, 1, 4.0, 1]), layers, bits=(2, 8))
    plan = clado.solve(sens, avg_bits=2.1, bitops=32 * (10 * 2 + 1000 * 2), pin={"b": 2})
    assert plan.bits == {"a": 2, "b": 2}
    with pytest.raises(clado.CladoError, match="bitops must be at least"):
        clado.solve(sens, bitops=32 * (10 * 2 + 1000 * 2), pin={"b": 8})


def test_pins_and_bans() -> None:
    sens = instance(5, (2, 4, 8), 1)
    plan = clado.solve(sens, avg_bits=5, pin={"l0": 8}, forbid={"l1": [2, 8]})
    assert plan.bits["l0"] == 8
    assert plan.bits["l1"] == 4
    with pytest.raises(clado.CladoError, match="layer must be one of 5 known layers, got 'nobody'"):
        clado.solve(sens, avg_bits=5, pin={"nobody": 8})
    with pytest.raises(clado.CladoError, match="leave every layer a width"):
        clado.solve(sens, avg_bits=5, forbid={"l1": [2, 4, 8]})


def test_same_call_same_plan_and_time_limit_holds() -> None:
    sens = instance(30, (2, 4, 8), 5)
    start = time.monotonic()
    plans = [clado.solve(sens, avg_bits=3.0, time_limit=3) for _ in range(2)]
    assert time.monotonic() - start < 10
    assert plans[0].bits == plans[1].bits
    assert plans[0].bound <= plans[0].objective
    assert plans[0].status in ("optimal", "feasible")


def test_heuristic_alone_claims_nothing() -> None:
    plan = clado.solve(instance(6, (2, 4, 8), 2), avg_bits=3, solver="heuristic")
    assert plan.status == "feasible"
    assert plan.bound == -np.inf
    assert Plan.from_json(plan.to_json()) == plan


def test_zero_matrix_and_single_layer() -> None:
    sens = Sensitivity.from_matrix(np.zeros((3, 3)), [("a", 10)], bits=(2, 4, 8))
    assert clado.solve(sens, avg_bits=4).status == "optimal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget must be given, one or more of avg_bits, size_mb, size_bytes, bitops"),
        ({"avg_bits": float("nan")}, "avg_bits must be a positive number, got nan"),
        ({"avg_bits": -1}, "avg_bits must be a positive number"),
        ({"avg_bits": 3, "objective": "best"}, "objective must be one of"),
        ({"avg_bits": 3, "solver": "gurobi"}, "solver must be one of"),
        ({"avg_bits": 3, "time_limit": 0}, "time_limit must be positive"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(clado.CladoError, match=message):
        clado.solve(instance(3, (2, 4, 8), 0), **arguments)


def test_nan_is_named() -> None:
    sens = instance(3, (2, 4, 8), 0)
    sens.interaction[4, 1] = np.nan
    with pytest.raises(clado.CladoError, match="sensitivity must be finite, got NaN or infinity for l1 at 4 bits"):
        clado.solve(sens, avg_bits=3)

"""solve against trying every choice; bounds, budgets, bad input, repeatability, time."""

from __future__ import annotations

import time

import clado
import numpy as np
import pytest
from clado import CladoError, Sensitivity
from clado.sensitivity import same_layer
from clado.solve.objectives import objective_matrix

from bench.solve.families import family
from tests.solve import instances


def check_against_brute_force(sens: Sensitivity, plan: clado.Plan, budgets: dict[str, float], objective: str) -> None:
    inside = same_layer(len(sens.layers), len(sens.bits))
    matrix = objective_matrix(sens.matrix, sens.stderr, inside, objective)
    value, mask = instances.values(sens, matrix), instances.within(sens, budgets)
    if not mask.any():
        assert plan.status == "infeasible"
        assert "cannot hold together" in plan.note
        return
    scale = max(np.abs(value).max(), np.abs(np.diag(matrix)).sum())
    best = value[mask].min()
    picked = sens.one_hot(plan.bits)
    assert plan.objective == pytest.approx(0.5 * picked @ matrix @ picked, abs=1e-12 * scale)
    reference = max(abs(plan.objective), np.abs(np.diag(matrix)) @ picked / 2)
    assert plan.objective >= best - 1e-12 * scale
    assert plan.bound <= best + 1e-12 * scale
    assert plan.gap == pytest.approx((plan.objective - plan.bound) / reference if reference else 0, abs=1e-12)
    assert plan.objective - best <= max(1e-6 * reference, 1e-12 * scale) or plan.status != "optimal"
    for name, use in plan.usage.items():
        assert use["used"] <= budgets[name] * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(120))
def test_equals_brute_force(seed: int) -> None:
    case = instances.instance(seed)
    objective = ("original", "original", "clipped", "diagonal")[seed % 4]
    plan = clado.solve(case.sens, **case.budgets, objective=objective)
    assert plan.status != "feasible"
    check_against_brute_force(case.sens, plan, case.budgets, objective)


@pytest.mark.parametrize("seed", range(20))
def test_heuristic_alone_reports_an_honest_bound(seed: int) -> None:
    case = instances.instance(1000 + seed)
    plan = clado.solve(case.sens, **case.budgets, solver="heuristic")
    check_against_brute_force(case.sens, plan, case.budgets, "original")


@pytest.mark.parametrize("seed", range(20))
def test_pins_and_bans(seed: int) -> None:
    sens = instances.sensitivity(seed, 5, (2, 4, 8))
    plan = clado.solve(sens, avg_bits=5, pin={"layer1": 4}, forbid={"layer0": 2, "layer3": (4, 8)})
    picks = np.array(sens.bits)[instances.choices(sens)]
    mask = instances.within(sens, {"avg_bits": 5}) & (picks[:, 1] == 4) & (picks[:, 0] != 2) & (picks[:, 3] == 2)
    assert plan.bits["layer1"] == 4
    assert plan.bits["layer3"] == 2
    assert plan.objective == pytest.approx(instances.values(sens, sens.matrix)[mask].min(), rel=1e-6, abs=1e-9)


def test_shrunk_by_hand() -> None:
    sens = instances.sensitivity(3, 4, (2, 4, 8))
    stderr = np.abs(np.random.default_rng(0).normal(size=sens.matrix.shape)) * 0.3 * np.abs(sens.interaction)
    stderr = (stderr + stderr.T) / 2
    known = Sensitivity(sens.layers, sens.bits, sens.delta_loss, sens.interaction, stderr)
    plan = clado.solve(known, avg_bits=4, objective="shrunk")
    expected = np.zeros_like(sens.matrix)
    for v in range(12):
        for w in range(12):
            omega = sens.interaction[v, w]
            expected[v, w] = omega * max(0, 1 - stderr[v, w] ** 2 / omega**2) if v // 3 != w // 3 else 0
    expected += np.diag(np.diag(sens.matrix))
    mask = instances.within(sens, {"avg_bits": 4})
    assert plan.objective == pytest.approx(instances.values(sens, expected)[mask].min(), rel=1e-6)
    assert set(plan.values) == {"original", "clipped", "shrunk", "diagonal"}
    with pytest.raises(CladoError, match="standard errors are unknown"):
        clado.solve(sens, avg_bits=4, objective="shrunk")


@pytest.mark.parametrize("seed", range(3))
def test_budget_of_a_plan_gives_the_plan_back(seed: int) -> None:
    """A limit computed in floating point from a use allows that use, for every kind of budget."""
    sens = instances.sensitivity(seed, 6, (2, 4, 8))
    plan = clado.solve(sens, avg_bits=4.3, size_mb=1, bitops=1e9)
    for name in ("avg_bits", "size_mb", "bitops"):
        again = clado.solve(sens, **{name: plan.usage[name]["used"]})
        assert again.usage[name]["used"] <= plan.usage[name]["used"]
        assert again.objective <= plan.objective + 1e-6 * abs(plan.objective)


def test_minimum_and_beyond_the_maximum() -> None:
    sens = instances.sensitivity(5, 6, (2, 4, 8))
    stored = instances.uses(sens)[1].astype(int)
    least = clado.solve(sens, size_bytes=stored.min())
    assert least.status == "optimal"
    assert least.size_bytes == stored.min()
    loose = clado.solve(sens, size_bytes=10 * stored.max(), avg_bits=40)
    assert loose.status == "optimal"
    with pytest.raises(CladoError, match=rf"size_bytes must be at least {stored.min()} .* 1 too low"):
        clado.solve(sens, size_bytes=stored.min() - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget must be given"),
        ({"avg_bits": float("nan")}, "avg_bits must be a positive finite number, got nan"),
        ({"size_mb": float("inf")}, "size_mb must be a positive finite"),
        ({"avg_bits": 0}, "avg_bits must be a positive"),
        ({"avg_bits": "3"}, "avg_bits must be a positive"),
        ({"avg_bits": True}, "avg_bits must be a positive"),
        ({"avg_bits": 1.5}, r"avg_bits must be at least 2 \(.*got 1.5, which is 0.5 too low"),
        ({"avg_bits": 4, "pin": {"nowhere": 4}}, "layer must be one of"),
        ({"avg_bits": 4, "pin": {"layer0": 3}}, "bits must be one of"),
        ({"avg_bits": 4, "forbid": {"layer0": (2, 4, 8)}}, "leave layer 'layer0' a width"),
        ({"avg_bits": 4, "objective": "best"}, "objective must be one of"),
        ({"avg_bits": 4, "solver": "magic"}, "solver must be one of"),
        ({"avg_bits": 4, "time_limit": 0}, "time_limit must be positive"),
        ({"avg_bits": 4, "gap": float("nan")}, "gap must be"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict, message: str) -> None:
    with pytest.raises(CladoError, match=message) as error:
        clado.solve(instances.sensitivity(0, 4, (2, 4, 8)), **arguments)
    assert "\n" not in str(error.value)


def test_macs_unknown() -> None:
    sens = Sensitivity.from_matrix(np.eye(3), [("a", 10)], (2, 4, 8))
    with pytest.raises(CladoError, match="macs are known"):
        clado.solve(sens, bitops=1e9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_named_and_can_be_forbidden(value: float) -> None:
    sens = instances.sensitivity(0, 4, (2, 4, 8))
    broken = sens.delta_loss.copy()
    broken[4] = value
    sens = Sensitivity(sens.layers, sens.bits, broken, sens.interaction, sens.stderr)
    with pytest.raises(CladoError, match=r"\(layer1, 4\)"):
        clado.solve(sens, avg_bits=4)
    plan = clado.solve(sens, avg_bits=4, forbid={"layer1": 4})
    assert plan.status == "optimal"
    assert plan.bits["layer1"] != 4
    crossed = sens.interaction.copy()
    crossed[0, 10] = crossed[10, 0] = value
    sens = Sensitivity(
        sens.layers, sens.bits, np.abs(instances.sensitivity(0, 4, (2, 4, 8)).delta_loss), crossed, sens.stderr
    )
    with pytest.raises(CladoError, match=r"\(layer0, 2\), \(layer3, 4\)"):
        clado.solve(sens, avg_bits=4)


def test_same_seed_same_plan() -> None:
    sens = family("digits", (2, 3, 4, 8), noise=0.3)
    first, second = (clado.solve(sens, avg_bits=3.5, solver="heuristic", seed=4) for _ in range(2))
    assert first.bits == second.bits
    assert (first.objective, first.bound) == (second.objective, second.bound)


@pytest.mark.parametrize("bits", [(2, 4, 8), (2, 3, 4, 8)])
def test_quickstart_size_is_proven(bits: tuple[int, ...]) -> None:
    plan = clado.solve(family("digits", bits, noise=0.1), avg_bits=3.0)
    assert plan.status == "optimal"


def test_time_limit_is_kept() -> None:
    sens = family("vit_l", noise=0.7)
    started = time.monotonic()
    plan = clado.solve(sens, avg_bits=4, time_limit=2.0)
    assert time.monotonic() - started < 3.0
    assert plan.status in ("feasible", "optimal")
    assert plan.bound <= plan.objective

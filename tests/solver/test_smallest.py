"""The inverse question against trying every choice: least use within a loss, its bound, other wishes, what cannot be had."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clado
from bench.solve.families import family
from clado import CladoError, Sensitivity
from clado.solver import objective_matrix
from tests.solver import instances

AXES = ("avg_bits", "size_bytes", "bitops")
EXAMPLES = int(os.environ.get("CLADO_BRUTE_FORCE", 60))  # thousands take minutes: for a change of the solver


def check(
    sens: Sensitivity, plan: clado.Plan, limit: float, minimize: str, mask: np.ndarray, objective: str = "original"
) -> None:
    """The plan against every choice of ``mask``, the losses of which are decided up to a relative gap of 1e-6."""
    matrix = objective_matrix(sens.matrix, sens.stderr, sens.candidates.same_layer, objective)
    value, use = instances.values(sens, matrix), dict(zip(AXES, instances.uses(sens), strict=True))[minimize]
    picks = instances.choices(sens) + np.arange(len(sens.layers)) * len(sens.bits)
    near = 1.1e-6 * np.maximum(np.abs(value), np.abs(np.diag(matrix))[picks].sum(axis=1) / 2)
    surely, maybe = mask & (value <= limit - near), mask & (value <= limit + near)
    if plan.status == "infeasible":
        assert not surely.any()
        return
    assert maybe.any()
    note = plan.info["minimized"]
    least, most = use[maybe].min(), use[surely].min() if surely.any() else np.inf
    assert (note["name"], note["max_loss_increase"]) == (minimize, limit)
    assert note["used"] == pytest.approx(plan.usage[minimize]["used"], rel=1e-12)
    assert note["used"] == pytest.approx(use[chosen(sens, plan)], rel=1e-12)
    assert mask[chosen(sens, plan)]
    assert note["bound"] <= most * (1 + 1e-12)
    assert note["bound"] <= note["used"]
    assert note["used"] >= least * (1 - 1e-12)
    assert plan.objective == pytest.approx(value[chosen(sens, plan)], abs=1e-12 * np.abs(value).max())
    assert plan.objective <= limit + near[chosen(sens, plan)]
    if plan.status == "optimal":
        assert note["used"] <= most * (1 + 1e-12)
    # As if its use had been the budget: the bound is of the loss.
    within = value[mask & (use <= note["used"] * (1 + 1e-12))]
    assert plan.bound <= within.min() + 1e-12 * np.abs(value).max()


def chosen(sens: Sensitivity, plan: clado.Plan) -> int:
    """The plan's place among :func:`instances.choices`."""
    picks = [sens.bits.index(bits) for bits in plan.bits.values()]
    return int(np.flatnonzero((instances.choices(sens) == picks).all(axis=1))[0])


def limit_of(sens: Sensitivity, objective: str, share: float) -> float:
    """The value of the choice at ``share`` of all, by value."""
    matrix = objective_matrix(sens.matrix, sens.stderr, sens.candidates.same_layer, objective)
    value = np.sort(instances.values(sens, matrix))
    return float(value[round(share * (len(value) - 1))])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.3, 0.7, 1.0]),
    beside=st.sampled_from([-0.01, 0.0, 1e-9, 0.01]),
    minimize=st.sampled_from(AXES),
    objective=st.sampled_from(["original", "original", "clipped", "diagonal"]),
    others=st.booleans(),
    solver=st.sampled_from(["auto", "auto", "heuristic", "scip"]),
)
def test_equals_brute_force(
    seed: int, share: float, beside: float, minimize: str, objective: str, others: bool, solver: str
) -> None:
    case = instances.instance(seed)
    budgets = case.budgets if others else {}
    limit = limit_of(case.sens, objective, share) * (1 + beside)
    wishes = {"max_loss_increase": limit, "minimize": minimize, "objective": objective, "solver": solver}
    plan = None
    with contextlib.suppress(CladoError):
        plan = clado.solve(case.sens, **budgets, **wishes)
    if plan is None:
        assert solver == "heuristic"  # found none, and proved nothing
        with pytest.raises(CladoError, match=r"max_loss_increase must be at least .* or there be more time or another"):
            clado.solve(case.sens, **budgets, **wishes)
        return
    if solver == "auto":
        assert plan.status != "feasible"
    check(case.sens, plan, limit, minimize, instances.within(case.sens, budgets), objective)


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), minimize=st.sampled_from(AXES))
def test_pins_bans_and_shared_layers_hold(seed: int, share: float, minimize: str) -> None:
    sens = instances.sensitivity(seed, 5, (2, 4, 8))
    limit = limit_of(sens, "original", share)
    wishes: dict[str, Any] = {"pin": {"layer1": 4}, "forbid": {"layer0": 2}, "shared_layers": [["layer2", "layer4"]]}
    plan = clado.solve(sens, max_loss_increase=limit, minimize=minimize, **wishes)
    width = np.array(sens.bits)[instances.choices(sens)]
    check(sens, plan, limit, minimize, (width[:, 1] == 4) & (width[:, 0] != 2) & (width[:, 2] == width[:, 4]))


@pytest.mark.parametrize("seed", range(4))
def test_least_latency(seed: int) -> None:
    """Real times, whose whole units are so fine that no bisection could come to its end one by one."""
    sens = instances.sensitivity(seed, 5, (2, 4, 8))
    table = np.random.default_rng(seed).random((5, 3)) + 0.1
    latency = {f"layer{i}": dict(zip((2, 4, 8), map(float, table[i]), strict=True)) for i in range(5)}
    value, limit = instances.values(sens, sens.matrix), limit_of(sens, "original", 0.1)
    plan = clado.solve(sens, max_loss_increase=limit, minimize="latency_ms", latency=latency)
    least = table[np.arange(5), instances.choices(sens)].sum(axis=1)[value <= limit * (1 + 1e-12)].min()
    assert plan.status == "optimal"
    assert plan.info["minimized"]["used"] == pytest.approx(least, rel=1e-12)
    assert plan.info["minimized"]["bound"] == pytest.approx(least, rel=1e-12)
    assert plan.info["minimized"]["questions"] < 40


def test_it_is_the_inverse_of_a_budget() -> None:
    """The least size for the loss of the best plan of a size is at most that size, and its plan no worse."""
    sens = instances.sensitivity(8, 12, (2, 4, 8))
    plan = clado.solve(sens, avg_bits=4)
    back = clado.solve(sens, max_loss_increase=plan.objective, minimize="avg_bits")
    assert back.status == "optimal"
    assert back.avg_bits <= plan.avg_bits
    assert back.objective <= plan.objective + 1e-9 * abs(plan.objective)
    assert clado.Plan.from_json(back.to_json()).info == back.info
    again = clado.solve(sens, avg_bits=back.info["minimized"]["used"])
    assert again.objective == pytest.approx(back.objective, rel=1e-6)


def test_size_is_what_is_minimized_unless_told() -> None:
    sens = instances.sensitivity(2, 4, (2, 4, 8))
    limit = limit_of(sens, "original", 0.2)
    assert clado.solve(sens, max_loss_increase=limit).info["minimized"]["name"] == "size_bytes"


def test_the_budget_that_is_minimized_may_be_given_too() -> None:
    sens = instances.sensitivity(2, 4, (2, 4, 8))
    limit = limit_of(sens, "original", 0.2)
    least = clado.solve(sens, max_loss_increase=limit).size_bytes
    assert clado.solve(sens, size_bytes=least, max_loss_increase=limit).size_bytes == least
    none = clado.solve(sens, size_bytes=least - 1, max_loss_increase=limit)
    assert none.status == "infeasible"
    assert none.info["reason"].startswith("max_loss_increase must be at least ")


def test_no_plan_of_so_small_a_loss() -> None:
    """By hand: 8 bits everywhere cost 0.1 + 0.1."""
    sens = Sensitivity.from_matrix(np.diag([2.0, 1.0, 0.2] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    plan = clado.solve(sens, max_loss_increase=0.19, minimize="avg_bits")
    assert plan.status == "infeasible"
    assert plan.bits == {}
    reason = "max_loss_increase must be at least 0.2 with the other wishes kept, got 0.19"
    assert plan.info["reason"] == reason
    assert clado.solve(sens, max_loss_increase=0.2, minimize="avg_bits").bits == {"a": 8, "b": 8}
    # a at 4 bits and b at 8 cost 0.5 + 0.1; the other way round more bits for the same loss.
    assert clado.solve(sens, max_loss_increase=0.6, minimize="avg_bits").bits == {"a": 4, "b": 8}
    # Budgets that conflict by themselves are said to.
    latency = {name: {2: 3.0, 4: 2.0, 8: 1.0} for name in ("a", "b")}
    both = clado.solve(sens, avg_bits=3, latency_ms=4, latency=latency, max_loss_increase=9)
    assert both.status == "infeasible"
    assert "cannot hold together" in both.info["reason"]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"minimize": "avg_bits", "avg_bits": 4}, "solve: minimize must come with max_loss_increase, got 'avg_bits'"),
        ({"max_loss_increase": 0.1, "minimize": "energy"}, "solve: minimize must be one of avg_bits, size_mb, "),
        ({"max_loss_increase": float("nan")}, "solve: max_loss_increase must be a finite number of nats, got nan"),
        ({"max_loss_increase": 0.1, "minimize": "latency_ms"}, "solve: latency must be given to minimize latency_ms"),
    ],
)
def test_what_cannot_be_meant_is_one_line(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(CladoError) as error:
        clado.solve(instances.sensitivity(0, 4, (2, 4, 8)), **wishes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_functions_that_choose_by_loss_refuse_the_inverse() -> None:
    sens = instances.sensitivity(0, 4, (2, 4, 8))
    with pytest.raises(CladoError, match="pareto: arguments must leave max_loss_increase and minimize to solve, got m"):
        clado.pareto(sens, avg_bits=[4], max_loss_increase=0.1)
    with pytest.raises(CladoError, match="shortlist: arguments must leave max_loss_increase and minimize to solve"):
        clado.shortlist(sens, max_loss_increase=0.1, minimize="avg_bits")
    with pytest.raises(
        CladoError, match="correct: arguments must leave max_loss_increase and minimize to solve, got m"
    ):
        clado.correct(torch.nn.Identity(), [], sens, max_loss_increase=0.1, minimize="avg_bits")


def test_what_time_leaves_open_is_said() -> None:
    """Without branch and bound a gap stays: the bound is below the size, and says so."""
    sens = family("vit_b", noise=0.4)
    limit = clado.solve(sens, avg_bits=3, solver="heuristic").objective
    plan = clado.solve(sens, max_loss_increase=limit, minimize="avg_bits", solver="heuristic", time_limit=20)
    note = plan.info["minimized"]
    assert plan.status == "feasible"
    assert 2 < note["bound"] < note["used"] <= 3
    assert plan.objective <= limit

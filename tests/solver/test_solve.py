"""solve against trying every choice; bounds, budgets, bad input, repeatability, time."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

import clado
from bench.solve import brute_force
from bench.solve.families import family
from clado import CladoError, Sensitivity
from clado.solver import objective_matrix, read_latency
from clado.solver.products import Products
from clado.solver.program import Program
from clado.solver.shift import convex_form, spectral_form
from tests.solver import instances

BRUTE_FORCE = int(os.environ.get("CLADO_BRUTE_FORCE", 300))  # thousands take minutes: for a change of the solver


def check_against_brute_force(sens: Sensitivity, plan: clado.Plan, budgets: dict[str, float], objective: str) -> None:
    inside = sens.candidates.same_layer
    matrix = objective_matrix(sens.matrix, sens.stderr, inside, objective)
    value, mask = instances.values(sens, matrix), instances.within(sens, budgets)
    if not mask.any():
        assert plan.status == "infeasible"
        assert "cannot hold together" in plan.info["reason"]
        return
    scale = max(np.abs(value).max(), np.abs(np.diag(matrix)).sum())
    best = value[mask].min()
    picked = sens.one_hot(plan.bits)
    assert plan.objective == pytest.approx(0.5 * picked @ matrix @ picked, abs=1e-12 * scale)
    reference = max(abs(plan.objective), np.abs(np.diag(matrix)) @ picked / 2)
    assert plan.objective >= best - 1e-12 * scale
    assert plan.bound <= best + 1e-12 * scale
    gap = (plan.objective - plan.bound) / reference if reference else 0
    assert plan.info["relative_gap"] == pytest.approx(gap, abs=1e-12)
    assert plan.objective - best <= max(1e-6 * reference, 1e-12 * scale) or plan.status != "optimal"
    for name, use in plan.usage.items():
        assert use["used"] <= budgets[name] * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(BRUTE_FORCE))
def test_equals_brute_force(seed: int) -> None:
    case = instances.instance(seed)
    objective = ("original", "original", "clipped", "diagonal")[seed % 4]
    plan = clado.solve(case.sens, **case.budgets, objective=objective)
    assert plan.status != "feasible"
    check_against_brute_force(case.sens, plan, case.budgets, objective)


@pytest.mark.parametrize("path", brute_force.PATHS, ids=lambda path: path[0])
def test_every_path_of_the_solver_equals_brute_force(path: tuple) -> None:
    for seed in range(5000, 5030):
        brute_force.check(seed, *path[:3])


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
    known = Sensitivity(sens.candidates, sens.delta_loss, sens.interaction, stderr)
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
    with pytest.raises(CladoError, match=rf"size_bytes must be at least {stored.min()}, got .*\(1 too low\)"):
        clado.solve(sens, size_bytes=stored.min() - 1)


def test_budgets_that_conflict_only_together() -> None:
    """Wide is fast, narrow is small: neither layer can be both."""
    sens = Sensitivity.from_matrix(np.diag([1.0, 0.5, 0.1] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    latency = {name: {2: 3.0, 4: 2.0, 8: 1.0} for name in ("a", "b")}
    plan = clado.solve(sens, avg_bits=3, latency_ms=4, latency=latency)
    assert plan.status == "infeasible"
    assert plan.bits == {}
    # By hand: 4 ms needs both at 4 bits or one at 8 (b: 600 bits of 150 weights); 3 bits allow b at 4, which takes 5 ms.
    assert "avg_bits at least 4 (got 3)" in plan.info["reason"]
    assert "latency_ms at least 5 (got 4)" in plan.info["reason"]
    assert clado.Plan.from_json(plan.to_json()).info == plan.info
    both = clado.solve(sens, avg_bits=4, latency_ms=4, latency=latency)
    assert both.status == "optimal"
    assert both.usage["latency_ms"] == {"used": 4.0, "limit": 4}


@pytest.mark.parametrize("seed", range(60))
def test_latency_and_own_constraints_equal_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    sens = instances.sensitivity(seed, 5, (2, 4, 8))
    table, weights = random.uniform(0.1, 2, (5, 3)), random.normal(size=(5, 3))
    named = {layer.name: dict(zip(sens.bits, row, strict=True)) for layer, row in zip(sens.layers, table, strict=True)}
    own = {layer.name: dict(zip(sens.bits, row, strict=True)) for layer, row in zip(sens.layers, weights, strict=True)}
    picks = instances.choices(sens)
    time_used = table[np.arange(5), picks].sum(axis=1)
    own_used = weights[np.arange(5), picks].sum(axis=1)
    limit, other = np.quantile(time_used, random.choice([0.0, 0.05, 0.3])), np.quantile(own_used, random.uniform())
    constraint = clado.LinearConstraint("mine", own, other)
    mask = (time_used <= limit + 1e-12) & (own_used <= other + 1e-12)
    value = instances.values(sens, sens.matrix)
    plan = clado.solve(sens, latency_ms=limit, latency=named, constraints=[constraint])
    assert (plan.status == "infeasible") == (not mask.any())
    if mask.any():
        assert plan.objective == pytest.approx(value[mask].min(), rel=1e-6, abs=1e-9)
        assert plan.bound <= value[mask].min() + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_shared_layers_and_width_limits_equal_brute_force(seed: int) -> None:
    sens = instances.sensitivity(seed, 6, (2, 4, 8))
    shared = [("layer1", "layer4"), ("layer4", "layer5")]
    plan = clado.solve(sens, avg_bits=5, shared_layers=shared, min_bits={"layer0": 4}, max_bits={"layer2": 4})
    picks = np.array(sens.bits)[instances.choices(sens)]
    mask = instances.within(sens, {"avg_bits": 5}) & (picks[:, 0] >= 4) & (picks[:, 2] <= 4)
    mask &= (picks[:, 1] == picks[:, 4]) & (picks[:, 4] == picks[:, 5])
    if not mask.any():
        assert plan.status == "infeasible"
        return
    assert plan.objective == pytest.approx(instances.values(sens, sens.matrix)[mask].min(), rel=1e-6, abs=1e-9)
    assert plan.bits["layer1"] == plan.bits["layer4"] == plan.bits["layer5"]


def test_latency_files(tmp_path: Path) -> None:
    table = {"a": {2: 1.0, 4: 2.0, 8: 4.5}, "b": {2: 0.5, 4: 1.0, 8: 2.0}}
    (tmp_path / "t.json").write_text(json.dumps(table))
    lines = ["layer,bits,ms", *(f"{name},{b},{ms}" for name, row in table.items() for b, ms in row.items())]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert read_latency(tmp_path / "t.json") == read_latency(tmp_path / "t.csv") == table
    sens = Sensitivity.from_matrix(np.diag([1.0, 0.5, 0.1] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    assert clado.solve(sens, latency_ms=5.0, latency=tmp_path / "t.csv").usage["latency_ms"]["used"] <= 5
    for text in ("", "layer,bits,ms\na,two,1", "[1]", "a;b"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CladoError, match="path must be JSON"):
            read_latency(tmp_path / "bad.json")
    with pytest.raises(CladoError, match="be a CSV or JSON file"):
        read_latency(tmp_path / "none.csv")
    with pytest.raises(CladoError, match="give every layer a time"):
        clado.solve(sens, latency_ms=5.0, latency={"a": table["a"]})


def test_constraint_files(tmp_path: Path) -> None:
    sens = Sensitivity.from_matrix(np.diag([1.0, 0.5, 0.1] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    own = {"heat": {"limit": 3.5, "coefficients": {"a": {4: 1.0, 8: 3.0}, "b": {8: 2.0}}}}
    (tmp_path / "c.json").write_text(json.dumps(own))
    plan = clado.solve(sens, constraints=tmp_path / "c.json")
    # By hand: 8 and 4 bits use 3, 4 and 8 use 3, 8 and 8 use 5; both of the first two cost 0.05 + 0.25.
    assert plan.usage == {"heat": {"used": 3.0, "limit": 3.5}}
    assert plan.objective == pytest.approx(0.3)
    for text in ("", "[]", '{"heat": {}}', '{"heat": {"limit": "x", "coefficients": {}}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CladoError, match="constraints must be JSON"):
            clado.solve(sens, constraints=tmp_path / "bad.json")
    with pytest.raises(CladoError, match="constraints must be a JSON file"):
        clado.solve(sens, constraints=tmp_path / "none.json")


def test_pareto_is_monotone_and_proven() -> None:
    sens = family("digits", noise=0.3)
    plans = clado.pareto(sens, avg_bits=np.arange(2, 8.01, 0.5).tolist(), bitops=1e12)
    assert len(plans) == 13
    assert all(plan.status == "optimal" for plan in plans)
    assert all(a.objective >= b.objective and a.bound >= b.bound for a, b in itertools.pairwise(plans))
    assert plans[4].objective == pytest.approx(clado.solve(sens, avg_bits=4).objective, rel=1e-6)
    with pytest.raises(CladoError, match="exactly one sequence"):
        clado.pareto(sens, avg_bits=[3, 4], size_mb=[1, 2])
    with pytest.raises(CladoError, match="not be empty"):
        clado.pareto(sens, avg_bits=[])


def test_what_if_uses_the_cached_shift() -> None:
    sens = family("vit_b")
    solver = clado.Solver(sens)
    solver.solve(avg_bits=4, solver="heuristic")
    for wish in ({"avg_bits": 3.7}, {"avg_bits": 4, "pin": {"layer3": 8}}, {"avg_bits": 4, "forbid": {"layer9": 2}}):
        quick = solver.solve(**wish, solver="heuristic")
        exact = clado.solve(sens, **wish)
        assert exact.status == "optimal"
        assert quick.bound <= exact.objective <= quick.objective + 1e-12
        assert quick.info["seconds"] < 0.5


def test_scip_agrees_with_branch_and_bound() -> None:
    sens = instances.sensitivity(11, 12, (2, 4, 8))
    plans = [clado.solve(sens, avg_bits=4.2, solver=name) for name in ("bnb", "scip")]
    assert [plan.status for plan in plans] == ["optimal", "optimal"]
    assert plans[0].objective == pytest.approx(plans[1].objective, rel=1e-6)


def test_given_plan() -> None:
    sens = instances.sensitivity(2, 4, (2, 4, 8))
    uniform = clado.given_plan(sens, {layer.name: 4 for layer in sens.layers}, avg_bits=3)
    assert uniform.status == "given"
    assert uniform.objective == pytest.approx(sens.predict(uniform.bits))
    assert uniform.usage == {"avg_bits": {"used": 4.0, "limit": 3}}
    with pytest.raises(CladoError, match="name every layer"):
        clado.given_plan(sens, {"layer0": 4})


@pytest.mark.parametrize("seed", range(10))
def test_the_shift_changes_no_choice_and_is_convex(seed: int) -> None:
    sens = instances.sensitivity(seed, 6, (2, 4, 8))
    layer = np.repeat(np.arange(6), 3)
    rows = np.array([[2, 4, 8] * 6])
    program = Program(sens.matrix, layer, rows, np.array([24]))
    form = convex_form(program)
    size = np.abs(sens.matrix).max()
    assert np.linalg.eigvalsh(form.quadratic)[0] >= -1e-9 * size
    for pick in instances.choices(sens)[::7] + np.arange(6) * 3:
        x = np.zeros(18)
        x[pick] = 1
        shifted = x @ form.quadratic @ x / 2 + form.linear @ x + form.constant
        assert shifted == pytest.approx(program.value(pick), abs=1e-9 * size * 36)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["products", "spare", "spectral", "gershgorin"])
def test_other_forms_are_convex_and_below_every_choice(kind: str, seed: int) -> None:
    sens = instances.sensitivity(seed, 6, (2, 4, 8))
    rows = np.array([[2, 4, 8] * 6, [5, 3, 1] * 6])
    program = Program(sens.matrix, np.repeat(np.arange(6), 3), rows, np.array([24, 22]))
    removed = np.zeros_like(sens.matrix)
    if kind in ("products", "spare"):
        plain = convex_form(program)
        products = Products(program, plain, spare=kind == "spare")
        products.search(100, math.inf)
        lower, removed = products.lower()
        form = convex_form(lower)
        assert form.bound >= plain.bound - 1e-9 * np.abs(sens.matrix).max()
    else:
        form = spectral_form(program, math.inf if kind == "spectral" else 0.0)
    size = np.abs(sens.matrix).max()
    assert np.linalg.eigvalsh(form.quadratic)[0] >= -1e-9 * size
    values = []
    for pick in instances.choices(sens) + np.arange(6) * 3:
        x = np.zeros(18)
        x[pick] = 1
        if kind == "spare" and not program.feasible(pick):
            continue
        value = program.value(pick)
        assert x @ (form.quadratic + removed) @ x / 2 + form.linear @ x + form.constant <= value + 1e-9 * size * 36
        values += [value] if program.feasible(pick) else []
    assert form.bound <= min(values)


@pytest.mark.parametrize("shape", ["vit_b", "resnet50"])
def test_gap_is_a_promise(shape: str) -> None:
    plan = clado.solve(family(shape, noise=0.3), avg_bits=4, gap=0.02)
    assert plan.info["relative_gap"] <= 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget must be given"),
        ({"avg_bits": float("nan")}, "avg_bits must be a positive finite number, got nan"),
        ({"size_mb": float("inf")}, "size_mb must be a positive finite"),
        ({"avg_bits": 0}, "avg_bits must be a positive"),
        ({"avg_bits": "3"}, "avg_bits must be a positive"),
        ({"avg_bits": True}, "avg_bits must be a positive"),
        ({"avg_bits": 1.5}, r"avg_bits must be at least 2, got 1.5 \(0.5 too low\)"),
        ({"avg_bits": 4, "pin": {"nowhere": 4}}, "layer must be one of"),
        ({"avg_bits": 4, "pin": {"layer0": 3}}, "bits must be one of"),
        ({"avg_bits": 4, "forbid": {"layer0": (2, 4, 8)}}, "leave layer 'layer0' a width"),
        ({"avg_bits": 4, "objective": "best"}, "objective must be one of"),
        ({"avg_bits": 4, "solver": "magic"}, "solver must be one of"),
        ({"avg_bits": 4, "time_limit": 0}, "time_limit must be positive"),
        ({"avg_bits": 4, "max_bits": 1}, "leave layer 'layer0' a width"),
        ({"avg_bits": 4, "min_bits": {"nowhere": 4}}, "layer must be one of"),
        ({"avg_bits": 4, "shared_layers": ["layer0"]}, "shared_layers must hold groups"),
        ({"avg_bits": 4, "shared_layers": [("layer0", "nowhere")]}, "layer must be one of"),
        ({"latency_ms": 4}, "latency must be given with latency_ms"),
        ({"constraints": [clado.LinearConstraint("x", {"layer0": {2: float("nan")}}, 1)]}, "x must have finite"),
        ({"constraints": [clado.LinearConstraint("x", {}, float("inf"))]}, "x must have a finite limit"),
        ({"constraints": [clado.LinearConstraint("x", {"layer0": {2: 1.0}}, -1.0)]}, "x must be at least 0"),
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
    sens = Sensitivity(sens.candidates, broken, sens.interaction, sens.stderr)
    with pytest.raises(CladoError, match=r"\(layer1, 4\)"):
        clado.solve(sens, avg_bits=4)
    plan = clado.solve(sens, avg_bits=4, forbid={"layer1": 4})
    assert plan.status == "optimal"
    assert plan.bits["layer1"] != 4
    crossed = sens.interaction.copy()
    crossed[0, 10] = crossed[10, 0] = value
    sens = Sensitivity(sens.candidates, np.abs(instances.sensitivity(0, 4, (2, 4, 8)).delta_loss), crossed, sens.stderr)
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


@pytest.mark.parametrize(("shape", "seconds"), [("vit_l", 2.0), ("deep300", 3.0)])
def test_time_limit_is_kept(shape: str, seconds: float) -> None:
    sens = family(shape, noise=0.7)
    started = time.monotonic()
    plan = clado.solve(sens, avg_bits=4, time_limit=seconds)
    assert time.monotonic() - started < seconds + 1
    assert plan.status in ("feasible", "optimal")
    assert plan.bound <= plan.objective


@pytest.mark.parametrize("seed", range(30))
def test_near_plans_are_the_best_with_one_or_two_layers_changed(seed: int) -> None:
    sens = instances.sensitivity(seed, 5, (2, 4, 8), scale=10.0 ** (seed % 5))
    limits, shared = {"avg_bits": 4.4, "size_bytes": 900}, [["layer1", "layer3"]]
    solver = clado.Solver(sens)
    wishes = {"forbid": {"layer2": 4}, "shared_layers": shared if seed % 2 else []}
    plan = solver.solve(**limits, **wishes)
    assert plan.bits
    near = solver.near(plan, 6, **limits, **wishes)
    table, mask = instances.values(sens, sens.matrix), instances.within(sens, limits)
    names = [layer.name for layer in sens.layers]
    expected = []
    for value, good, pick in zip(table, mask, instances.choices(sens), strict=True):
        bits = {name: sens.bits[k] for name, k in zip(names, pick, strict=True)}
        changed = {
            "layer1" if n == "layer3" and wishes["shared_layers"] else n for n in names if bits[n] != plan.bits[n]
        }
        tied = not wishes["shared_layers"] or bits["layer1"] == bits["layer3"]
        if good and tied and bits["layer2"] != 4 and 1 <= len(changed) <= 2:
            expected.append(value)
    assert [p.objective for p in near] == pytest.approx(sorted(expected)[:6], abs=1e-12 * sens.delta_loss.max())
    assert all(p.objective >= p.bound for p in near)
    assert all(use["used"] <= use["limit"] for p in near for use in p.usage.values())


def test_shortlist_holds_every_objective_and_the_near_plans_once() -> None:
    sens = instances.sensitivity(3, 9, (2, 4, 8))
    plans = clado.shortlist(sens, avg_bits=4.0, near=3)
    assert len({tuple(p.bits.values()) for p in plans}) == len(plans) >= 4
    assert plans[0].objective_name == "original"
    assert plans[0].status == "optimal"
    best = {name: clado.solve(sens, avg_bits=4.0, objective=name) for name in ("diagonal", "clipped")}
    assert all(any(p.bits == plan.bits for p in plans) for plan in best.values())
    with pytest.raises(CladoError, match="objective must be left out"):
        clado.shortlist(sens, avg_bits=4.0, objective="clipped")
    for near in (-1, 1.5):
        with pytest.raises(CladoError, match=f"shortlist: near must be a whole number, not negative, got {near}"):
            clado.shortlist(sens, avg_bits=4.0, near=near)

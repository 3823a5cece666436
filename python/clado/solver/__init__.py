"""From a sensitivity matrix and budgets to a plan with a certificate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import CladoError, require
from ..plan import Plan
from ..sensitivity import Sensitivity, same_layer
from .exact import SLACK, Answer, solve_convex, solve_linear
from .heuristic import Search
from .problem import Choice, Matrix, Problem, budget_unit, build, cost_row
from .shift import convexify

OBJECTIVES = ("original", "clipped", "shrunk", "diagonal")
SOLVERS = ("auto", "scip", "heuristic")
# The objective is scaled so that the heuristic's diagonal part is this; "optimal" means a bound within TOLERANCE of the value.
SCALE = 100.0
TOLERANCE = 1e-3
_KICKS = 60

__all__ = ["OBJECTIVES", "given_plan", "objective_matrix", "solve"]


def solve(
    sens: Sensitivity,
    avg_bits: float | None = None,
    size_mb: float | None = None,
    size_bytes: float | None = None,
    bitops: float | None = None,
    *,
    objective: str = "original",
    pin: Mapping[str, int] | None = None,
    forbid: Mapping[str, Sequence[int]] | None = None,
    solver: str = "auto",
    time_limit: float = 60.0,
    seed: int = 0,
) -> Plan:
    """Choose bits per layer: min ½xᵀGx within every given budget.

    Args:
        sens: the sensitivity matrix.
        avg_bits: bits per weight, codes alone.
        size_mb, size_bytes: MiB or bytes of packed codes and scales, as export writes them.
        bitops: Σ macs · bits · 32 (activations stay float).
        objective: "original"; "clipped" (negative eigenvalues of G set to zero, the paper); "shrunk" (each Ω times
            max(0, 1 - se²/Ω²), the positive-part James-Stein factor of one mean; needs standard errors); "diagonal" (Ω = 0).
        pin: {layer: bits} to keep.
        forbid: {layer: widths} to leave out.
        solver: "auto" and "scip" search and then prove with SCIP; "heuristic" searches only.
        time_limit: seconds for all of it.
        seed: of the search.

    Returns:
        The plan: "optimal" when the bound closes within 1e-5 of its diagonal part, else "feasible" with a true bound, or
        "infeasible" when several budgets exclude each other.

    Raises:
        CladoError: bad arguments, or a budget below its minimum, which is named.
    """
    start = time.monotonic()
    require(objective in OBJECTIVES, "solve", "objective", f"be one of {', '.join(OBJECTIVES)}", repr(objective))
    require(solver in SOLVERS, "solve", "solver", f"be one of {', '.join(SOLVERS)}", repr(solver))
    require(time_limit > 0, "solve", "time_limit", "be positive", time_limit)
    given = {"avg_bits": avg_bits, "size_mb": size_mb, "size_bytes": size_bytes, "bitops": bitops}
    budgets = {name: value for name, value in given.items() if value is not None}
    _check_finite(sens)
    matrix = objective_matrix(sens, objective)
    problem = build(sens, matrix, budgets, pin or {}, forbid or {})

    unit = _unit(problem)
    scaled = replace(problem, matrix=problem.matrix * unit)
    search = Search(scaled, seed)
    search.run(_KICKS)
    best, bound = search.best, -np.inf
    if best is None:
        answer = solve_linear(scaled, time_limit, objective=False)
        if answer.infeasible:
            info = {"reason": f"no choice meets {' and '.join(budgets)} together", "seconds": time.monotonic() - start}
            return Plan(
                sens.layers,
                {},
                "infeasible",
                objective_name=objective,
                quantizer=sens.quantizer,
                fingerprint=sens.fingerprint,
                info=info,
            )
        if answer.choice is None:
            raise CladoError(f"solve: time_limit must be long enough to find any plan, got {time_limit:g} s")
        search.improve(answer.choice)
        best = search.best
    assert best is not None
    if solver != "heuristic":
        left = time_limit - (time.monotonic() - start)
        answer = _prove(scaled, best, objective, left, start, time_limit)
        bound = answer.bound
        if answer.choice is not None and scaled.value(answer.choice) < scaled.value(best):
            best = answer.choice
    value = scaled.value(best)
    closed = value - bound <= TOLERANCE
    plan = given_plan(sens, _named(sens, best), objective, budgets)
    return replace(
        plan,
        status="optimal" if closed else "feasible",
        bound=min(bound / unit, plan.objective),
        info={
            "solver": solver,
            "seconds": time.monotonic() - start,
            "negative_eigenvalue_share": _negative_share(sens),
        },
    )


def given_plan(
    sens: Sensitivity, bits: Mapping[str, int], objective: str = "original", budgets: Mapping[str, float] | None = None
) -> Plan:
    """A plan of the given bits, priced but not solved for: uniform widths, or one of the user's own.

    Raises:
        CladoError: a layer without bits, or a width that was not measured.
    """
    x = sens.one_hot(dict(bits))
    values = {}
    for name in OBJECTIVES:
        if name != "shrunk" or np.isfinite(sens.stderr).all():
            values[name] = float(0.5 * x @ objective_matrix(sens, name) @ x)
    usage = {}
    for name, limit in (budgets or {}).items():
        usage[name] = {"used": float(np.dot(cost_row(sens, name), x)) / budget_unit(sens, name), "limit": float(limit)}
    ordered = {layer.name: int(bits[layer.name]) for layer in sens.layers}
    return Plan(
        sens.layers,
        ordered,
        "given",
        values.get(objective, float("nan")),
        -np.inf,
        objective,
        values,
        usage,
        sens.quantizer,
        sens.fingerprint,
    )


def objective_matrix(sens: Sensitivity, objective: str) -> Matrix:
    """G as an objective sees it, ``[V, V]``.

    "clipped" is Σ max(λ, 0) vvᵀ over the eigenpairs of G: it changes the problem, also on plans (arXiv 2307.05657). "shrunk"
    multiplies every Ω by max(0, 1 - se²/Ω²): the positive-part James-Stein estimator of a single normal mean.
    """
    matrix = sens.matrix
    if objective == "diagonal":
        return np.diag(np.diag(matrix))
    if objective == "clipped":
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.maximum(values, 0.0)) @ vectors.T
    if objective == "shrunk":
        require(
            bool(np.isfinite(sens.stderr).all()),
            "solve",
            "objective",
            "not be shrunk without standard errors",
            "unknown errors",
        )
        omega = sens.interaction
        with np.errstate(divide="ignore", invalid="ignore"):
            keep = np.where(omega != 0, np.maximum(0.0, 1.0 - sens.stderr**2 / omega**2), 0.0)
        return np.where(np.eye(len(matrix), dtype=bool), matrix, omega * keep)
    return matrix


def _prove(problem: Problem, best: Choice, objective: str, left: float, start: float, time_limit: float) -> Answer:
    if left <= 0.05:
        return Answer(None, -np.inf, False)
    interactions = problem.matrix[~np.eye(len(problem.matrix), dtype=bool)]
    if objective == "diagonal" or not interactions.any():
        return solve_linear(problem, left)
    convex = convexify(problem, min(20.0, 0.3 * left))
    left = time_limit - (time.monotonic() - start)
    return solve_convex(problem, convex, best, left, TOLERANCE - SLACK) if left > 0.05 else Answer(None, -np.inf, False)


def _unit(problem: Problem) -> float:
    """Factor that brings the matrix to the size the tolerances are made for: Σ of each layer's middle ΔL becomes SCALE."""
    diagonal = 0.5 * np.abs(np.diag(problem.matrix))
    size = sum(float(np.median(diagonal[members])) for members in problem.members) or float(
        np.abs(problem.matrix).max(initial=0.0)
    )
    return SCALE / size if size > 0 else 1.0


def _named(sens: Sensitivity, choice: Choice) -> dict[str, int]:
    width = len(sens.bits)
    return {sens.layers[int(c) // width].name: sens.bits[int(c) % width] for c in choice}


def _check_finite(sens: Sensitivity) -> None:
    bad = ~np.isfinite(sens.delta_loss) | ~np.isfinite(sens.interaction).all(1)
    width = len(sens.bits)
    names = [f"{sens.layers[v // width].name} at {sens.bits[v % width]} bits" for v in np.flatnonzero(bad)]
    require(
        not names,
        "solve",
        "sensitivity",
        "be finite",
        f"NaN or infinity for {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
    )
    require(
        not sens.interaction[same_layer(len(sens.layers), width)].any(),
        "solve",
        "sensitivity",
        "be zero between candidates of one layer",
        "other values",
    )


def _negative_share(sens: Sensitivity) -> float:
    """Share of the eigenvalue mass of G that is negative."""
    values = np.linalg.eigvalsh(sens.matrix)
    total = float(np.abs(values).sum())
    return float(-values[values < 0].sum()) / total if total else 0.0

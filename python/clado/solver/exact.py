"""SCIP on the factored convex objective: t_k >= (Fy)_k², minimise ½Σt + qᵀy + constant. Imported only when solving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Choice, Problem
from .shift import Convex

# SCIP keeps constraints to 1e-6; with the objective scaled to about 100 this covers what that can cost the bound.
SLACK = 1e-4


@dataclass(frozen=True)
class Answer:
    """Best choice seen (None without one) and a valid lower bound, in the problem's own units; proven infeasible or not."""

    choice: Choice | None
    bound: float
    infeasible: bool


def solve_convex(problem: Problem, convex: Convex, start: Choice | None, seconds: float, gap: float) -> Answer:
    """Branch and bound on a problem whose objective is scaled to about 100, for at most ``seconds``."""
    from pyscipopt import quicksum

    model, x = _model(problem, seconds)
    position = {int(c): k for k, c in enumerate(convex.candidates)}
    y = [x[int(c)] - convex.centre[k] for k, c in enumerate(convex.candidates)]
    keep = np.flatnonzero(np.abs(convex.factor).max(1, initial=0.0) > 0)
    rows = convex.factor[keep] @ convex.basis.T
    linear = convex.basis @ convex.linear
    epigraph = []
    for row in rows:
        z = model.addVar(lb=None)
        t = model.addVar(lb=0.0)
        model.addCons(z == quicksum(float(w) * v for w, v in zip(row, y, strict=True)))
        model.addCons(t >= z * z)
        epigraph.append((z, t))
    model.setObjective(
        0.5 * quicksum(t for _, t in epigraph)
        + quicksum(float(w) * v for w, v in zip(linear, y, strict=True))
        + convex.constant,
        "minimize",
    )
    model.setParam("limits/absgap", gap)
    if start is not None:
        point = -convex.centre.copy()
        point[[position[int(c)] for c in start]] += 1
        solution = model.createSol()
        for candidate, variable in x.items():
            model.setSolVal(solution, variable, float(candidate in start))
        for (z, t), value in zip(epigraph, rows @ point, strict=True):
            model.setSolVal(solution, z, value)
            model.setSolVal(solution, t, value * value)
        model.addSol(solution)
    return _answer(model, x, problem, SLACK)


def solve_linear(problem: Problem, seconds: float, objective: bool = True) -> Answer:
    """The diagonal alone, an integer linear program; without ``objective``, just a choice within the budgets."""
    from pyscipopt import quicksum

    model, x = _model(problem, seconds)
    if objective:
        diagonal = 0.5 * np.diag(problem.matrix)
        model.setObjective(quicksum(float(diagonal[c]) * v for c, v in x.items()), "minimize")
        model.setParam("limits/gap", 0.0)
    return _answer(model, x, problem, SLACK if objective else 0.0)


def _model(problem: Problem, seconds: float):  # type: ignore[no-untyped-def]
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    model.setParam("limits/time", max(0.01, seconds))
    model.setParam("parallel/maxnthreads", 1)
    model.setParam("randomization/randomseedshift", 0)
    x = {int(c): model.addVar(vtype="B") for members in problem.members for c in members}
    for members in problem.members:
        model.addCons(quicksum(x[int(c)] for c in members) == 1)
    for cost, limit in zip(problem.costs, problem.limits, strict=True):
        # Relative to the limit, so that SCIP's tolerance means the same for every budget; choices are checked exactly after.
        scale = max(limit, 1.0)
        model.addCons(quicksum(float(cost[c] / scale) * v for c, v in x.items()) <= float(limit / scale))
    return model, x


def _answer(model, x, problem: Problem, slack: float) -> Answer:  # type: ignore[no-untyped-def]
    model.optimize()
    if model.getStatus() == "infeasible":
        return Answer(None, np.inf, True)
    best: Choice | None = None
    for solution in model.getSols():
        chosen = np.array(
            [
                members[int(np.argmax([model.getSolVal(solution, x[int(c)]) for c in members]))]
                for members in problem.members
            ]
        )
        if problem.feasible(chosen) and (best is None or problem.value(chosen) < problem.value(best)):
            best = chosen
    bound = model.getDualbound()
    return Answer(best, bound - slack if abs(bound) < 1e19 else -np.inf, False)

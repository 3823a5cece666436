"""SCIP on the factored convex form: z = F x, t_k ≥ z_k², so that every cut SCIP needs is a tangent of a parabola."""

from __future__ import annotations

import time

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .program import Program
from .shift import ConvexForm

Choice = NDArray[np.int64]
_FEASIBILITY = 1e-7  # SCIP's absolute tolerance; each of the parabolas may be missed by this much


def exact(
    program: Program, form: ConvexForm, incumbent: Choice | None, deadline: float, tolerance: float, seed: int = 0
) -> tuple[Choice | None, float, bool]:
    """Search for a choice that beats ``incumbent`` by more than ``tolerance``.

    Args:
        program: scaled so that objectives are of the order of 1 to 1000.
        form: a convex form of ``program``.
        incumbent: ``[L]`` candidates that meet every budget, or None.
        deadline: ``time.monotonic()`` value at which to stop.
        tolerance: how much better, in units of the objective.
        seed: SCIP's random seed.

    Returns:
        The best choice known, a lower bound on every feasible choice, and whether SCIP finished. (None, inf, True)
        proves that no choice meets the budgets.
    """
    from pyscipopt import Model, quicksum

    value = program.value(incumbent) if incumbent is not None else np.inf
    factor, missing = _factor(form.quadratic)
    model = Model("clado")
    model.hideOutput()
    model.setParams(
        {
            "timing/clocktype": 2,
            "limits/time": max(0.05, deadline - time.monotonic()),
            "numerics/feastol": _FEASIBILITY,
            "limits/gap": 0.0,
            "randomization/randomseedshift": seed,
            "randomization/permutationseed": seed,
            "parallel/maxnthreads": 1,
            "lp/threads": 1,
            "misc/catchctrlc": False,
        }
    )
    x = [model.addVar(vtype="B", obj=float(cost)) for cost in form.linear]
    model.addObjoffset(form.constant)
    for low, high in zip(program.starts, program.starts[1:], strict=False):
        model.addCons(quicksum(x[low:high]) == 1)
    scale = program.row_scale
    for row, limit, unit in zip(program.rows, program.limits, scale, strict=True):
        model.addCons(quicksum(float(a) / unit * v for a, v in zip(row, x, strict=True) if a) <= float(limit) / unit)
    for row in factor:
        z = model.addVar(lb=None, ub=None)
        t = model.addVar(lb=0.0, obj=1.0)
        model.addCons(quicksum(float(row[j]) * x[j] for j in np.flatnonzero(row)) == z)
        model.addCons(z * z <= t)
    if incumbent is not None:
        model.setObjlimit(value - tolerance)
    model.optimize()

    best = incumbent
    for solution in model.getSols():
        found = np.array(
            [
                low + int(np.argmax([model.getSolVal(solution, x[j]) for j in range(low, high)]))
                for low, high in zip(program.starts, program.starts[1:], strict=False)
            ]
        )
        if program.feasible(found) and program.value(found) < value:
            best, value = found, program.value(found)
    finished = model.getStatus() in ("optimal", "infeasible", "gaplimit")
    none_better = model.getStatus() == "infeasible"
    bound = np.inf if none_better and incumbent is None else model.getDualbound()
    if none_better and incumbent is not None:
        bound = value - tolerance
    if incumbent is not None:
        bound = min(bound, program.value(incumbent) - tolerance)
    bound = bound - missing - form.slack - 2 * _FEASIBILITY * (len(factor) + 1)
    model.freeProb()
    return best, float(max(bound, form.bound)), finished


def _factor(quadratic: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """F with FᵀF = Q/2 up to eigenvalues that are left out, and what leaving them out can raise a bound by."""
    values, vectors = scipy.linalg.eigh(quadratic / 2)
    largest = max(float(values[-1]), 0.0)
    keep = values > 1e-10 * largest
    left_out = np.abs(values[~keep]).max(initial=0.0)
    factor = np.sqrt(values[keep])[:, None] * vectors[:, keep].T
    factor[np.abs(factor) < 1e-14 * np.sqrt(largest)] = 0
    return factor, float(left_out) * len(quadratic)

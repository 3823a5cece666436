"""The same program as users would write it for other solvers. Each returns (value, bound); missing packages return None."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from clado.solver.program import Program

Result = tuple[float, float] | None


def scip_dense(program: Program, seconds: float) -> Result:
    """SCIP, the whole objective as one quadratic row."""
    return _scip(program, program.matrix, seconds)


def scip_clipped(program: Program, seconds: float) -> Result:
    """SCIP after setting negative eigenvalues to zero, as in the CLADO paper: its bound belongs to that other objective."""
    values, vectors = np.linalg.eigh(program.matrix)
    return _scip(program, (vectors * np.maximum(values, 0)) @ vectors.T, seconds)


def _scip(program: Program, matrix: NDArray[np.float64], seconds: float) -> Result:
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    model.setParams({"limits/time": seconds, "timing/clocktype": 2, "lp/threads": 1})
    x = [model.addVar(vtype="B") for _ in range(program.size)]
    epigraph = model.addVar(lb=None, obj=1.0)
    for low, high in zip(program.starts, program.starts[1:], strict=False):
        model.addCons(quicksum(x[low:high]) == 1)
    for row, limit, unit in zip(program.rows, program.limits, program.row_scale, strict=True):
        model.addCons(quicksum(a / unit * v for a, v in zip(row, x, strict=True)) <= limit / unit)
    terms = [
        float(matrix[v, v] / 2 if v == w else matrix[v, w]) * x[v] * x[w]
        for v in range(program.size)
        for w in range(v, program.size)
        if matrix[v, w] != 0
    ]
    model.addCons(quicksum(terms) <= epigraph)
    model.optimize()
    if model.getNSols() == 0:
        return math.inf, model.getDualbound()
    chosen = np.array([round(model.getVal(v)) for v in x], dtype=float)
    return float(chosen @ program.matrix @ chosen / 2), model.getDualbound()


def highs_linearised(program: Program, seconds: float) -> Result:
    """HiGHS with a variable per product, x_v summed over the other layers' products (HiGHS knows no integer quadratics)."""
    v, w = np.nonzero(np.triu(program.layer[:, None] != program.layer[None, :]))
    size, pairs = program.size, len(v)
    cost = np.r_[np.diag(program.matrix) / 2, program.matrix[v, w]]
    one = scipy.sparse.csr_matrix(
        (np.ones(size), (program.layer, np.arange(size))), shape=(program.num_layers, size + pairs)
    )
    both = np.r_[v * program.num_layers + program.layer[w], w * program.num_layers + program.layer[v]]
    used, row = np.unique(both, return_inverse=True)
    column = np.r_[size + np.arange(pairs), size + np.arange(pairs)]
    link = scipy.sparse.csr_matrix((np.ones(2 * pairs), (row, column)), shape=(len(used), size + pairs))
    link -= scipy.sparse.csr_matrix(
        (np.ones(len(used)), (np.arange(len(used)), used // program.num_layers)), shape=link.shape
    )
    budget = np.hstack([program.rows / program.row_scale[:, None], np.zeros((len(program.rows), pairs))])
    answer = milp(
        cost,
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(link, 0, 0),
            LinearConstraint(scipy.sparse.csr_matrix(budget), -np.inf, program.limits / program.row_scale),
        ],
        integrality=np.r_[np.ones(size), np.zeros(pairs)],
        bounds=Bounds(0, 1),
        options={"time_limit": seconds},
    )
    bound = answer.mip_dual_bound
    return math.inf if answer.fun is None else float(answer.fun), -math.inf if bound is None else float(bound)


def gurobi(program: Program, seconds: float) -> Result:
    """Gurobi on the objective as it is; the package's free licence refuses large programs."""
    if importlib.util.find_spec("gurobipy") is None:
        return None
    import gurobipy

    with gurobipy.Env(params={"OutputFlag": 0}) as environment, gurobipy.Model(env=environment) as model:
        model.Params.TimeLimit, model.Params.Threads, model.Params.NonConvex = seconds, 1, 2
        x = model.addMVar(program.size, vtype="B")
        for low, high in zip(program.starts, program.starts[1:], strict=False):
            model.addConstr(x[low:high].sum() == 1)
        model.addConstr((program.rows / program.row_scale[:, None]) @ x <= program.limits / program.row_scale)
        model.setObjective(x @ (program.matrix / 2) @ x)
        try:
            model.optimize()
        except gurobipy.GurobiError:
            return None
        return float(model.ObjVal) if model.SolCount else math.inf, float(model.ObjBound)


def cp_sat(program: Program, seconds: float) -> Result:
    """CP-SAT with a Boolean per product, the objective in millionths of its largest entry."""
    if importlib.util.find_spec("ortools") is None:
        return None
    from ortools.sat.python import cp_model

    model, unit = cp_model.CpModel(), float(np.abs(program.matrix).max()) / 1e6
    x = [model.new_bool_var("") for _ in range(program.size)]
    for low, high in zip(program.starts, program.starts[1:], strict=False):
        model.add_exactly_one(x[low:high])
    for row, limit in zip(program.rows, program.limits, strict=True):
        model.add(sum(int(a) * v for a, v in zip(row, x, strict=True)) <= int(limit))
    terms = [round(program.matrix[v, v] / 2 / unit) * x[v] for v in range(program.size)]
    for v, w in zip(*np.nonzero(np.triu(program.matrix, 1)), strict=True):
        product = model.new_bool_var("")
        model.add_bool_or([x[v].negated(), x[w].negated(), product])
        model.add_implication(product, x[v])
        model.add_implication(product, x[w])
        terms.append(round(program.matrix[v, w] / unit) * product)
    model.minimize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = seconds, 1
    found = solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return solver.objective_value * unit if found else math.inf, solver.best_objective_bound * unit


RIVALS = {
    "SCIP dense": scip_dense,
    "SCIP clipped": scip_clipped,
    "HiGHS linearised": highs_linearised,
    "Gurobi": gurobi,
    "CP-SAT": cp_sat,
}

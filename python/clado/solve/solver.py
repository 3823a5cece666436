"""solve: budgets, preparation, heuristics, bound, exact search, and the plan that says what was proven."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CladoError, require
from ..plan import Plan
from ..sensitivity import Sensitivity, same_layer
from . import scip
from .budgets import Budget, allowed_candidates, check_minimum, make_budgets
from .heuristic import search
from .objectives import NAMES, errors_known, negative_mass, objective_matrix
from .program import Program, within_reach, worth_keeping
from .shift import ConvexForm, convex_form, linear_form
from .threads import one_thread

SOLVERS = ("auto", "scip", "heuristic")
CLOSED = 1e-6  # gap at which a plan counts as optimal
Choice = NDArray[np.int64]


def solve(
    sens: Sensitivity,
    avg_bits: float | None = None,
    size_mb: float | None = None,
    size_bytes: float | None = None,
    bitops: float | None = None,
    *,
    objective: str = "original",
    pin: Mapping[str, int] | None = None,
    forbid: Mapping[str, int | Sequence[int]] | None = None,
    act_bits: int = 32,
    time_limit: float = 60.0,
    gap: float = 0.0,
    seed: int = 0,
    solver: str = "auto",
) -> Plan:
    """Choose bits per layer: least predicted loss increase ½ xᵀGx within every budget that is given.

    Args:
        sens: the sensitivity matrix.
        avg_bits: upper bound on Σ bits·weights / Σ weights.
        size_mb: upper bound on the exported bytes of the layers (codes and scales) in MiB (2**20 bytes).
        size_bytes: the same in bytes.
        bitops: upper bound on Σ macs·bits·act_bits for one sample.
        objective: "original", "clipped", "shrunk" or "diagonal"; see :func:`clado.solve.objectives.objective_matrix`.
        pin: {layer: bits} that must be taken.
        forbid: {layer: bits or several bits} that must not be taken.
        act_bits: width of the activations in ``bitops``; 32 while they stay float.
        time_limit: seconds of wall time.
        gap: stop once the gap (see :class:`clado.Plan`) is proven to be at most this.
        seed: of everything random; the same call gives the same plan unless the time limit ended it.
        solver: "auto" or "scip" (heuristics, bound, exact search), "heuristic" (heuristics and bound).

    Returns:
        Plan: its status is "infeasible" when the budgets are proven to conflict although each alone could be met.

    Raises:
        CladoError: no budget, a budget below its minimum, a layer or width that is unknown, NaN or infinity in the
            matrix at a candidate that is allowed, an unknown objective or solver.
    """
    started = time.monotonic()
    require(solver in SOLVERS, "solve", "solver", f"be one of {SOLVERS}", repr(solver))
    require(objective in NAMES, "solve", "objective", f"be one of {NAMES}", repr(objective))
    require(math.isfinite(time_limit) and time_limit > 0, "solve", "time_limit", "be positive seconds", time_limit)
    require(math.isfinite(gap) and gap >= 0, "solve", "gap", "be non-negative", gap)
    budgets = make_budgets(sens, avg_bits, size_mb, size_bytes, bitops, act_bits)
    layer = np.repeat(np.arange(len(sens.layers)), len(sens.bits))
    keep = np.flatnonzero(allowed_candidates(sens, pin, forbid))
    original = _finite_matrix(sens, keep)
    for budget in budgets:
        check_minimum(budget, layer, keep)

    with one_thread():
        inside = same_layer(len(sens.layers), len(sens.bits))
        matrices = {
            name: objective_matrix(original, sens.stderr, inside, name)
            for name in NAMES
            if name == objective or name != "shrunk" or errors_known(sens.stderr, inside)
        }
        rows = np.stack([budget.use for budget in budgets])
        limits = np.array([budget.limit for budget in budgets], dtype=np.int64)
        whole = Program(matrices[objective], layer, rows, limits)
        answer = _answer(whole, keep, started + time_limit, gap, seed, solver)
        if answer.choice is None:
            note = _conflict(whole, keep, budgets, started + time_limit)
            return _infeasible(sens, budgets, objective, note, time.monotonic() - started)
        values = {name: Program(matrix, layer, rows, limits).value(answer.choice) for name, matrix in matrices.items()}
        mass = negative_mass(matrices["original"])
    return _plan(sens, budgets, objective, answer, values, mass, whole, time.monotonic() - started)


@dataclass(frozen=True)
class Answer:
    """A choice of candidates of the whole program (None: proven infeasible), its proven bound, and who did it."""

    choice: Choice | None
    bound: float
    solver: str


def _answer(whole: Program, keep: Choice, deadline: float, gap: float, seed: int, solver: str) -> Answer:
    reach = within_reach(whole, keep)
    if len(np.unique(whole.layer[reach])) < whole.num_layers:
        return Answer(None, math.inf, "presolve")
    program = whole.restricted(reach)
    largest = float(np.abs(program.matrix).max(initial=0.0))
    scale = 1.0 / largest if largest > 0 else 1.0
    incumbent = search(program.scaled(scale), seed, deadline=deadline)
    if incumbent is None:
        incumbent = _any_feasible(program, deadline, seed)
        if incumbent is None:
            return Answer(None, math.inf, "scip")
    useful = worth_keeping(program, program.value(incumbent))
    program, incumbent = program.restricted(useful), np.searchsorted(useful, incumbent)
    diagonal = _reference(program, incumbent)
    scale = 100.0 / diagonal if diagonal > 0 else scale
    choice, bound, name = _prove(program.scaled(scale), incumbent, deadline, gap, seed, solver)
    return Answer(reach[useful[choice]], bound / scale, name)


def _prove(
    program: Program, incumbent: Choice, deadline: float, gap: float, seed: int, solver: str
) -> tuple[Choice, float, str]:
    """A choice at least as good as ``incumbent`` and a lower bound on all choices, in the program's scale."""
    value, reference = program.value(incumbent), _reference(program, incumbent)
    if program.size == program.num_layers:
        return incumbent, value, "presolve"
    tolerance = max(gap, CLOSED / 4) * reference
    form = _form(program, deadline, value - CLOSED / 4 * reference)
    if form.bound >= value - tolerance or solver == "heuristic":
        return incumbent, form.bound, "heuristic+sdp"
    best, bound, _ = scip.exact(program, form, incumbent, deadline, tolerance, seed)
    assert best is not None
    return best, max(bound, form.bound), "scip"


def _form(program: Program, deadline: float, target: float) -> ConvexForm:
    across = program.layer[:, None] != program.layer[None, :]
    if not program.matrix[across].any():
        return linear_form(program)
    return convex_form(program, deadline=deadline, target=target)


def _reference(program: Program, choice: Choice) -> float:
    """What gaps are relative to: the larger of |objective| and the sum of the magnitudes on the diagonal, halved."""
    return max(abs(program.value(choice)), float(np.abs(np.diag(program.matrix)[choice]).sum() / 2))


def _any_feasible(program: Program, deadline: float, seed: int) -> Choice | None:
    """Some choice within the budgets by an integer linear program; None when there is none."""
    nothing = Program(np.zeros_like(program.matrix), program.layer, program.rows, program.limits)
    choice, _, finished = scip.exact(nothing, linear_form(nothing), None, deadline, 0.0, seed)
    if choice is None and not finished:
        raise CladoError("solve: time_limit must be longer to find any plan within the budgets, got none yet")
    return choice


def _finite_matrix(sens: Sensitivity, keep: Choice) -> NDArray[np.float64]:
    """G with the rows of dropped candidates that are not finite set to zero.

    Raises:
        CladoError: an allowed candidate has a loss increase, or an interaction with another one, that is not finite.
    """
    matrix = sens.matrix
    bad = ~np.isfinite(matrix)
    inner = bad[np.ix_(keep, keep)]
    if inner.any():
        own = keep[np.diag(inner)]
        worst = own if len(own) else keep[inner.any(axis=1)]
        names = [f"({sens.layers[v // len(sens.bits)].name}, {sens.bits[v % len(sens.bits)]})" for v in worst]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CladoError(
            f"solve: matrix must be finite at every allowed candidate, got NaN or infinity at (layer, bits) "
            f"{', '.join(names[:5])}{more}; measure them again or forbid them"
        )
    matrix[bad] = 0
    return matrix


def _conflict(whole: Program, keep: Choice, budgets: list[Budget], deadline: float) -> str:
    """Which budget would have to give, and to what, for the others to hold."""
    needs = []
    for k, budget in enumerate(budgets):
        others = np.arange(len(budgets)) != k
        unit = float(whole.row_scale[k])
        cost = np.diag(2.0 * whole.rows[k] / unit)
        relaxed = Program(cost, whole.layer, whole.rows[others], whole.limits[others])
        reach = within_reach(relaxed, keep)
        if len(np.unique(whole.layer[reach])) < whole.num_layers:
            continue
        part = relaxed.restricted(reach)
        choice, _, finished = scip.exact(part, linear_form(part), None, max(deadline, time.monotonic() + 1), 0.0)
        if choice is not None and finished:
            least = int(whole.rows[k, reach[choice]].sum())
            needs.append(f"{budget.name} at least {budget.shown(least):.10g} (got {budget.given:.10g})")
    names = " and ".join(budget.name for budget in budgets)
    return f"{names} cannot hold together; with the others kept: {' or '.join(needs) or 'no single one can mend it'}"


def _infeasible(sens: Sensitivity, budgets: list[Budget], objective: str, note: str, seconds: float) -> Plan:
    return Plan(
        bits={},
        objective=None,
        bound=None,
        gap=None,
        status="infeasible",
        usage={},
        objective_name=objective,
        solver="scip",
        seconds=seconds,
        candidate_bits=sens.bits,
        quantizer=sens.quantizer.to_json(),
        fingerprint=dict(sens.fingerprint),
        note=note,
    )


def _plan(
    sens: Sensitivity,
    budgets: list[Budget],
    objective: str,
    answer: Answer,
    values: dict[str, float],
    mass: float,
    whole: Program,
    seconds: float,
) -> Plan:
    assert answer.choice is not None
    value = values[objective]
    bound = min(answer.bound, value)
    reference = _reference(whole, answer.choice)
    gap = (value - bound) / reference if reference > 0 else 0.0
    bits = {layer.name: sens.bits[v % len(sens.bits)] for layer, v in zip(sens.layers, answer.choice, strict=True)}
    return Plan(
        bits=bits,
        objective=value,
        bound=bound,
        gap=gap,
        status="optimal" if gap <= CLOSED else "feasible",
        usage={b.name: {"used": b.shown(b.use[answer.choice].sum()), "limit": b.given} for b in budgets},
        objective_name=objective,
        values=values,
        negative_mass=mass,
        solver=answer.solver,
        seconds=seconds,
        layer_bytes={layer.name: sens.quantizer.storage_bytes(layer.shape, bits[layer.name]) for layer in sens.layers},
        layer_numel={layer.name: layer.numel for layer in sens.layers},
        candidate_bits=sens.bits,
        quantizer=sens.quantizer.to_json(),
        fingerprint=dict(sens.fingerprint),
    )

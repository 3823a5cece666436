"""solve: from a sensitivity matrix, budgets and wishes to a plan that says what was proven."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CladoError, require
from ..plan import Plan
from ..sensitivity import Sensitivity, same_layer
from . import scip
from .budgets import Budget, LinearConstraint, Table, allowed_candidates, check_minimum, layer_groups, make_budgets
from .certify import CLOSED, SOLVERS, Answer, Effort, certify, reference, shifted
from .objectives import NAMES, errors_known, negative_mass, objective_matrix
from .program import Program, merged, within_reach
from .shift import ConvexForm, linear_form
from .threads import one_thread

Choice = NDArray[np.int64]
EIGEN_LIMIT = 1500  # candidates beyond which the clipped value is reported only when it is the objective


def solve(
    sens: Sensitivity,
    avg_bits: float | None = None,
    size_mb: float | None = None,
    size_bytes: float | None = None,
    bitops: float | None = None,
    latency_ms: float | None = None,
    *,
    latency: Table | str | os.PathLike[str] | None = None,
    constraints: Sequence[LinearConstraint] = (),
    objective: str = "original",
    pin: Mapping[str, int] | None = None,
    forbid: Mapping[str, int | Sequence[int]] | None = None,
    min_bits: int | Mapping[str, int] | None = None,
    max_bits: int | Mapping[str, int] | None = None,
    shared_layers: Sequence[Sequence[str]] = (),
    act_bits: int = 32,
    start: Plan | None = None,
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
        latency_ms: upper bound on the sum of ``latency``.
        latency: {layer: {bits: ms}}, or a file that :func:`clado.solver.budgets.read_latency` reads.
        constraints: linear constraints of your own.
        objective: "original", "clipped", "shrunk" or "diagonal"; see :func:`clado.solver.objectives.objective_matrix`.
        pin: {layer: bits} that must be taken.
        forbid: {layer: bits or several bits} that must not be taken.
        min_bits: least bits, for all layers or {layer: bits}.
        max_bits: most bits, likewise.
        shared_layers: groups of layer names that take the same bits.
        act_bits: width of the activations in ``bitops``; 32 while they stay float.
        start: a plan to begin with, where it is feasible; the answer is never worse.
        time_limit: seconds of wall time.
        gap: stop once the relative gap is proven to be at most this: objective − bound over the larger of |objective|
            and the sum of the magnitudes of the single increases.
        seed: of everything random; the same call gives the same plan unless the time limit ended it.
        solver: "auto" or "bnb" (heuristics, semidefinite bound, native branch and bound), "scip" (SCIP in its place),
            "heuristic" (heuristics and bound only).

    Returns:
        Plan: "optimal" when the relative gap is at most 1e-6, else "feasible", with a bound that holds for the stated
        objective; "infeasible" when the budgets are proven to conflict although each alone could be met (``info["reason"]``
        says which would have to give).

    Raises:
        CladoError: no budget, a budget below its minimum, a layer or width that is unknown, NaN or infinity in the
            matrix at a candidate that is allowed, an unknown objective or solver.
    """
    arguments = dict(locals())
    return Solver(arguments.pop("sens")).solve(**arguments)


class Solver:
    """A sensitivity matrix that is solved many times: what does not depend on the budgets is computed once.

    With ``solver="heuristic"`` a question that was asked before with other limits, pins or bans is answered in
    milliseconds: its bound then comes from the convex form of the earlier answer.
    """

    def __init__(self, sens: Sensitivity):
        self.sens = sens
        self.layer = np.repeat(np.arange(len(sens.layers)), len(sens.bits))
        self._matrices: dict[str, NDArray[np.float64]] = {}
        self._mass: float | None = None
        self._forms: dict[Any, ConvexForm] = {}
        self._dropped: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    def solve(
        self,
        *,
        objective: str = "original",
        pin: Mapping[str, int] | None = None,
        forbid: Mapping[str, int | Sequence[int]] | None = None,
        min_bits: int | Mapping[str, int] | None = None,
        max_bits: int | Mapping[str, int] | None = None,
        shared_layers: Sequence[Sequence[str]] = (),
        start: Plan | None = None,
        time_limit: float = 60.0,
        gap: float = 0.0,
        seed: int = 0,
        solver: str = "auto",
        **budget_arguments: Any,
    ) -> Plan:
        """See :func:`clado.solve`."""
        started = time.monotonic()
        require(solver in SOLVERS, "solve", "solver", f"be one of {SOLVERS}", repr(solver))
        require(objective in NAMES, "solve", "objective", f"be one of {NAMES}", repr(objective))
        require(math.isfinite(time_limit) and time_limit > 0, "solve", "time_limit", "be positive seconds", time_limit)
        require(math.isfinite(gap) and gap >= 0, "solve", "gap", "be non-negative", gap)
        effort = Effort(started + time_limit, gap, seed, solver)
        budgets = make_budgets(self.sens, **budget_arguments)
        keep = np.flatnonzero(allowed_candidates(self.sens, pin, forbid, min_bits, max_bits))
        for budget in budgets:
            check_minimum(budget, self.layer, keep)
        with one_thread():
            self.refresh(keep)
            program = Program(
                self._matrix(objective),
                self.layer,
                np.stack([budget.use for budget in budgets]),
                np.array([budget.limit for budget in budgets], dtype=np.int64),
            )
            groups = layer_groups(self.sens, shared_layers)
            answer = self._answer(program, keep, groups, effort, start, (objective, tuple(b.name for b in budgets)))
            if answer.choice is None:
                note = _conflict(program, keep, groups, budgets, effort)
                plan = self._infeasible(objective, note)
            else:
                plan = self._plan(program, budgets, objective, answer)
        plan.info["seconds"] = time.monotonic() - started
        return plan

    def _answer(
        self, program: Program, keep: Choice, groups: Choice, effort: Effort, start: Plan | None, key: tuple
    ) -> Answer:
        """Solve over groups of layers; the choice comes back over layers."""
        small, keep = merged(program, keep, groups)
        count = len(self.sens.bits)
        leaders = np.unique(groups, return_index=True)[1]
        begin = None
        if start is not None and list(start.bits) == [layer.name for layer in self.sens.layers]:
            widths = np.array([self.sens.bits.index(b) if b in self.sens.bits else 0 for b in start.bits.values()])
            begin = np.arange(len(leaders)) * count + widths[leaders]
        key = (*key, groups.tobytes())
        if len(np.unique(small.layer[keep])) < small.num_layers:
            return Answer(None, math.inf, "presolve")
        if effort.solver == "heuristic" and key not in self._forms and small.size <= EIGEN_LIMIT:
            reach = within_reach(small, keep)
            if len(reach) == small.size:
                self._forms[key] = shifted(small, effort.share(0.5))
        answer = certify(small, keep, effort, begin, self._forms.get(key))
        if answer.choice is None:
            return answer
        return replace(answer, choice=np.arange(len(groups)) * count + answer.choice[groups] % count)

    def refresh(self, keep: Choice) -> None:
        """Drop what was computed for another set of candidates that are not finite."""
        dropped = _not_finite(self.sens, keep)
        if not np.array_equal(dropped, self._dropped):
            self._matrices, self._forms, self._mass, self._dropped = {}, {}, None, dropped

    def _matrix(self, name: str) -> NDArray[np.float64]:
        if name not in self._matrices:
            original = self.sens.matrix
            original[self._dropped, :] = 0
            original[:, self._dropped] = 0
            inside = same_layer(len(self.sens.layers), len(self.sens.bits))
            self._matrices[name] = objective_matrix(original, self.sens.stderr, inside, name)
        return self._matrices[name]

    def values(self, choice: Choice, objective: str) -> dict[str, float]:
        inside = same_layer(len(self.sens.layers), len(self.sens.bits))
        known = {"shrunk": errors_known(self.sens.stderr, inside), "clipped": len(inside) <= EIGEN_LIMIT}
        names = [name for name in NAMES if name == objective or known.get(name, True)]
        return {name: float(self._matrix(name)[np.ix_(choice, choice)].sum() / 2) for name in names}

    def _plan(self, program: Program, budgets: list[Budget], objective: str, answer: Answer) -> Plan:
        sens, choice = self.sens, answer.choice
        assert choice is not None
        if self._mass is None and program.size <= EIGEN_LIMIT:
            self._mass = negative_mass(self._matrix("original"))
        value = program.value(choice)
        bound = min(answer.bound, value)
        unit = reference(program, choice)
        gap = (value - bound) / unit if unit > 0 else 0.0
        info = {"solver": answer.solver, "relative_gap": gap, "negative_eigenvalue_share": self._mass}
        return Plan(
            layers=sens.layers,
            bits={layer.name: sens.bits[v % len(sens.bits)] for layer, v in zip(sens.layers, choice, strict=True)},
            status="optimal" if gap <= CLOSED else "feasible",
            objective=value,
            bound=bound,
            objective_name=objective,
            values=self.values(choice, objective),
            usage={b.name: {"used": b.shown(b.use[choice].sum()), "limit": b.given} for b in budgets},
            quantizer=sens.quantizer,
            fingerprint=dict(sens.fingerprint),
            info=info,
        )

    def _infeasible(self, objective: str, reason: str) -> Plan:
        return Plan(
            layers=self.sens.layers,
            bits={},
            status="infeasible",
            objective_name=objective,
            quantizer=self.sens.quantizer,
            fingerprint=dict(self.sens.fingerprint),
            info={"solver": "presolve and scip", "reason": reason},
        )


def given_plan(sens: Sensitivity, bits: Mapping[str, int], objective: str = "original", **budgets: Any) -> Plan:
    """A plan of the given bits, priced but not solved for: uniform widths, or one of the user's own.

    Args:
        sens: the sensitivity matrix.
        bits: {layer: bits}, every layer.
        objective: what ``objective`` of the plan is measured by.
        **budgets: budgets of :func:`clado.solve` whose use is reported; they need not hold.

    Raises:
        CladoError: a layer without bits, a width that was not measured, NaN or infinity in the matrix.
    """
    choice = np.flatnonzero(sens.one_hot(dict(bits)))
    solver = Solver(sens)
    solver.refresh(choice)
    rows = make_budgets(sens, **budgets) if budgets else []
    values = solver.values(choice, objective)
    return Plan(
        layers=sens.layers,
        bits={layer.name: int(bits[layer.name]) for layer in sens.layers},
        status="given",
        objective=values[objective],
        objective_name=objective,
        values=values,
        usage={b.name: {"used": b.shown(b.use[choice].sum()), "limit": b.given} for b in rows},
        quantizer=sens.quantizer,
        fingerprint=dict(sens.fingerprint),
    )


def _not_finite(sens: Sensitivity, keep: Choice) -> NDArray[np.bool_]:
    """``[V]`` mask of dropped candidates whose losses are not finite.

    Raises:
        CladoError: an allowed candidate has a loss increase, or an interaction with another one, that is not finite.
    """
    bad: NDArray[np.bool_] = ~np.isfinite(sens.matrix)
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
    dropped: NDArray[np.bool_] = np.asarray(bad.any(axis=1))
    dropped[keep] = False
    return dropped


def _conflict(program: Program, keep: Choice, groups: Choice, budgets: list[Budget], effort: Effort) -> str:
    """Which budget would have to give, and to what, for the others to hold."""
    whole, keep = merged(program, keep, groups)
    needs = []
    for k, budget in enumerate(budgets):
        others = np.arange(len(budgets)) != k
        cost = np.diag(2.0 * whole.rows[k] / whole.row_scale[k])
        relaxed = Program(cost, whole.layer, whole.rows[others], whole.limits[others])
        reach = within_reach(relaxed, keep)
        if len(np.unique(whole.layer[reach])) < whole.num_layers:
            continue
        part = relaxed.restricted(reach)
        deadline = max(effort.share(0.5), time.monotonic() + 0.2)
        choice, _, finished = scip.exact(part, linear_form(part), None, deadline, 0.0)
        if choice is not None and finished:
            least = int(whole.rows[k, reach[choice]].sum())
            needs.append(f"{budget.name} at least {budget.shown(least):.10g} (got {float(budget.given):.10g})")
    names = " and ".join(budget.name for budget in budgets)
    return f"{names} cannot hold together; with the others kept: {' or '.join(needs) or 'no single one can mend it'}"

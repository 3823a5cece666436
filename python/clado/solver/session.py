"""solve: from a sensitivity matrix, budgets and wishes to a plan that says what was proven."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Plan, Sensitivity
from ..common import CladoError, check_known, require, some, takes
from ..quant import Scheme
from . import scip
from .budgets import Budget, allowed_candidates, check_minimum, layer_groups, make_budgets
from .certify import CLOSED, Answer, Effort, certify, reference, settled, shifted, tightened
from .native import blas_threads
from .objectives import NAMES, errors_known, negative_mass, objective_matrix
from .options import BUDGETS, SolveOptions
from .program import Merged, Program, merged, within_reach
from .shift import ConvexForm, linear_form
from .smallest import Bisection

Choice = NDArray[np.int64]
NEAR = 0.1  # relative gap beyond which a what-if question is worth a convex form of its own
EXACT, ROUGH = 1e-7, 1e-3  # how exactly the semidefinite programs of the first question and of later ones are solved
MOST_FORMS = 6  # limits whose convex forms are kept
SEARCH, QUESTION = 0.8, 0.25  # of the time that is left: for least use before least loss, and for one question of it
EIGEN_SHARE = 0.1  # of the time limit that eigenvalues may take for what is only reported


@takes(SolveOptions)
def solve(sens: Sensitivity, options: SolveOptions) -> Plan:
    """Choose bits per layer: least predicted loss increase ½ xᵀGx within every budget that is given.

    Args:
        sens: the sensitivity matrix.
        options: the arguments of :class:`SolveOptions`.

    With ``max_loss_increase`` the question is the inverse one: least ``minimize`` of all plans whose predicted loss increase
    is at most that, and within every budget that is given.

    Returns:
        Plan: "optimal" when the relative gap is at most 1e-6, else "feasible", with a bound that holds for the stated
        objective; "infeasible" when the budgets are proven to conflict although each alone could be met (``info["reason"]``
        says which would have to give).
        Of the inverse question: among the plans of the least use that was found, the one of least loss, as if that use had
        been given as a budget; ``bound`` is still of the loss, and holds for every plan within that use. ``info["minimized"]``
        holds ``name``, ``used``, ``bound`` (no plan of so small a loss uses less; both in the unit of the budget),
        ``max_loss_increase`` and ``questions`` (how many budgets were tried). "optimal": the bound is the use, where a loss
        that is larger than allowed by less than a relative gap of 1e-6 counts as allowed or not; "infeasible": no plan has so
        small a loss.

    Raises:
        CladoError: no budget, a budget below its minimum, a layer or width that is unknown, NaN or infinity in the
            matrix at a candidate that is allowed, an unknown objective or solver.
    """
    return Solver(sens).answer(options)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question as numbers: the program over all candidates, those that may be taken, and the group of each layer."""

    objective: str
    budgets: list[Budget]
    program: Program
    keep: Choice
    groups: Choice

    def merged_to(self, merge: Merged) -> Program:
        """The program over groups of layers, with this question's limits."""
        return replace(merge.program, limits=self.program.limits)


class Solver:
    """A sensitivity matrix that is solved many times: what does not depend on the budgets is computed once.

    With ``solver="heuristic"`` a question that was asked before with other limits, pins or bans is answered in
    milliseconds: its bound then comes from the convex forms of earlier answers, the best of them; a budget so different
    that none comes within 10 % costs one more form.
    """

    def __init__(self, sens: Sensitivity):
        must = "be a Sensitivity (of a run directory: clado.Sensitivity.load)"
        require(isinstance(sens, Sensitivity), "solve", "sens", must, type(sens).__name__)
        self.sens = sens
        self.layer = sens.candidates.layer_of
        self.schemes = np.unique([str(scheme.label) for scheme in sens.candidates.flat], return_inverse=True)[1]
        self._matrices: dict[str, NDArray[np.float64]] = {}
        self._mass: float | None = None
        self._forms: dict[Any, dict[bytes, list[ConvexForm]]] = {}
        self._dropped: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    @takes(SolveOptions)
    def solve(self, options: SolveOptions) -> Plan:
        """See :func:`clado.solve`."""
        return self.answer(options)

    def answer(self, options: SolveOptions) -> Plan:
        """The plan for a question that is an object already."""
        started = time.monotonic()
        effort = Effort(started + options.time_limit, options.gap, options.seed, options.solver)
        with blas_threads(options.threads):
            asked = self._ask(options.objective, options)
            self._report_eigenvalues(options.time_limit)
            if options.minimized is None:
                plan = self._least_loss(asked, effort, options.start)
            else:
                assert options.max_loss_increase is not None
                plan = self._least_use(asked, effort, options.start, options.minimized, options.max_loss_increase)
        plan.info["seconds"] = time.monotonic() - started
        return plan

    @takes(SolveOptions)
    def extent(self, name: str, options: SolveOptions) -> tuple[float, float]:
        """Least and most of a budget, in its unit: what the layers take, each by itself, within the limits and that budget.

        Args:
            name: of a budget that one number says, such as "size_bytes"; its own limit may be left out.

        The other arguments are those that were given to :meth:`solve`.
        """
        asked = self._ask(options.objective, replace(options, max_loss_increase=0.0, minimize=name))
        budget = next(b for b in asked.budgets if b.name == name)
        use, first = budget.use[asked.keep], np.flatnonzero(np.diff(self.layer[asked.keep], prepend=-1))
        most = min(budget.limit, int(np.maximum.reduceat(use, first).sum()))
        return budget.shown(np.minimum.reduceat(use, first).sum()), budget.shown(most)

    @takes(SolveOptions)
    def near(self, plan: Plan, count: int, options: SolveOptions) -> list[Plan]:
        """The ``count`` best plans within the budgets that differ from ``plan`` in one or two layers (or shared groups).

        Args:
            plan: an answer of :meth:`solve` to the same budgets and limits; its objective orders the others.
            count: how many at most.

        The other arguments are those that were given to :meth:`solve`; only budgets and limits count.
        """
        asked = self._ask(plan.objective_name, options)
        small = self._merged(asked)
        best = small.gather(self.sens.candidates.indices(plan.schemes))
        found = _neighbours(small.program, small.keep, best, count)
        return [self._plan(asked, small, Answer(choice, plan.bound, "near")) for choice in found]

    @takes(SolveOptions)
    def priced(self, other: Plan, best: Plan, options: SolveOptions) -> Plan:
        """Another matrix's plan at the price that this one gives it, under the objective of ``best``.

        Args:
            other: an answer to the same question about another matrix of the same candidates.
            best: an answer of :meth:`solve`; its bound holds for every plan within these budgets and limits.

        The other arguments are those that were given to :meth:`solve`; only budgets and limits count.
        """
        asked = self._ask(best.objective_name, options)
        small = self._merged(asked)
        choice = small.gather(self.sens.candidates.indices(other.schemes))
        return self._plan(asked, small, Answer(choice, best.bound, str(other.info["solver"])))

    def _ask(self, objective: str, options: SolveOptions) -> _Asked:
        """A question in numbers; refuses what cannot be meant."""
        rows = make_budgets(self.sens, options)
        keep = np.flatnonzero(allowed_candidates(self.sens, options))
        dropped = [self.sens.index(layer, scheme) for layer, scheme in self.sens.provenance.dropped]
        keep = np.setdiff1d(keep, np.array(dropped, dtype=keep.dtype))
        for budget in rows:
            check_minimum(budget, self.layer, keep)
        self.refresh(keep)
        program = Program(
            self._matrix(objective),
            self.layer,
            np.stack([budget.use for budget in rows]),
            np.array([budget.limit for budget in rows], dtype=np.int64),
        )
        return _Asked(objective, rows, program, keep, layer_groups(self.sens, options.shared_layers))

    def _least_loss(self, asked: _Asked, effort: Effort, start: Plan | None) -> Plan:
        """The plan of least loss within the budgets; solved over groups of layers."""
        merge = self._merged(asked)
        answer = self._answer(asked, merge, effort, self._start(merge, start))
        if answer.choice is None:
            return self._infeasible(asked.objective, _conflict(merge, asked.budgets, effort))
        return self._plan(asked, merge, answer)

    def _least_use(self, asked: _Asked, effort: Effort, start: Plan | None, name: str, value: float) -> Plan:
        """Of the plans with a loss of at most ``value`` the one of least use; then that of least loss within this use."""
        merge = self._merged(asked)
        row = [budget.name for budget in asked.budgets].index(name)
        begin, aim = self._start(merge, start), replace(effort, enough=value, gap=0.0)

        def ask(limit: int, best: Choice | None) -> Answer:
            one = replace(aim, deadline=aim.share(1.0 if best is None else QUESTION))
            return self._decided(_limited(asked, row, limit), merge, one, begin if best is None else best)

        if not merge.program.covered(merge.keep):
            return self._least_loss(asked, effort, start)
        found = Bisection(merge.program, merge.keep, row, value, ask, effort.share(SEARCH)).run()
        if found.choice is None:
            later = replace(effort, deadline=max(effort.deadline, time.monotonic() + 1))
            return self._too_strict(self._least_loss(asked, later, start), value, math.isinf(found.least))
        budget = asked.budgets[row]
        close = _limited(asked, row, int(merge.program.rows[row, found.choice].sum()))
        plan = self._plan(close, merge, self._answer(close, merge, effort, found.choice))
        used = int(asked.program.rows[row, self.sens.candidates.indices(plan.schemes)].sum())
        note = {
            "name": name,
            "used": budget.shown(used),
            "bound": budget.shown(min(int(found.least), used)),
            "max_loss_increase": value,
            "questions": found.questions,
        }
        status = "optimal" if found.least >= used else "feasible"
        return replace(plan, status=status, info={**plan.info, "minimized": note})

    def _too_strict(self, least: Plan, value: float, proven: bool) -> Plan:
        """What to say where no plan of so small a loss was found; ``least`` is that of the least one, if budgets allow any."""
        if not least.schemes:
            return least
        must = f"be at least {least.objective:.6g} with the other wishes kept"
        more = f"{must}, or there be more time or another solver, as none below {least.bound:.6g} is proven"
        require(proven, "solve", "max_loss_increase", more, f"{value:.6g}")
        return self._infeasible(least.objective_name, f"max_loss_increase must {must}, got {value:.6g}")

    def _decided(self, asked: _Asked, merge: Merged, effort: Effort, begin: Choice | None) -> Answer:
        """Whether there is a choice that is good enough: by the forms at hand first, which cost milliseconds."""
        answer = self._answer(asked, merge, replace(effort, solver="heuristic"), begin)
        program = asked.merged_to(merge)
        if effort.solver == "heuristic" or settled(program, answer, effort.enough):
            return answer
        return certify(program, merge.keep, effort, answer.choice)

    def _answer(self, asked: _Asked, merge: Merged, effort: Effort, begin: Choice | None) -> Answer:
        """The choice over groups of layers."""
        small, keep = asked.merged_to(merge), merge.keep
        if not small.covered(keep):
            return Answer(None, math.inf, "presolve")
        if effort.solver == "heuristic":
            key = (asked.objective, tuple(budget.name for budget in asked.budgets), asked.groups.tobytes())
            return _what_if(small, keep, effort, begin, self._forms.setdefault(key, {}))
        return certify(small, keep, effort, begin)

    def _merged(self, asked: _Asked) -> Merged:
        return merged(asked.program, asked.keep, asked.groups, self.schemes)

    def _start(self, merge: Merged, plan: Plan | None) -> Choice | None:
        """Candidates of the groups to begin with; a layer's first one where it was not measured at the plan's."""
        if plan is None or list(plan.schemes) != [layer.name for layer in self.sens.layers]:
            return None
        own = self.sens.candidates
        taken = [
            own.index(n, s) if own.has(n, s) else int(own.starts[k]) for k, (n, s) in enumerate(plan.schemes.items())
        ]
        return merge.gather(np.array(taken, np.int64))

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
            inside = self.sens.candidates.same_layer
            self._matrices[name] = objective_matrix(original, self.sens.stderr, inside, name)
        return self._matrices[name]

    def _report_eigenvalues(self, seconds: float) -> None:
        """Find the clipped matrix and the negative mass, which plans report, where ``seconds`` are plenty for it."""
        if self._mass is None and 2e-9 * self.sens.num_candidates**3 <= EIGEN_SHARE * seconds:
            self._mass = negative_mass(self._matrix("original"))
            self._matrix("clipped")

    def values(self, choice: Choice, objective: str) -> dict[str, float]:
        inside = self.sens.candidates.same_layer
        known = {"shrunk": errors_known(self.sens.stderr, inside), "clipped": "clipped" in self._matrices}
        names = [name for name in NAMES if name == objective or known.get(name, True)]
        return {name: float(self._matrix(name)[np.ix_(choice, choice)].sum() / 2) for name in names}

    def _plan(self, asked: _Asked, merge: Merged, answer: Answer) -> Plan:
        sens, program = self.sens, asked.program
        assert answer.choice is not None
        choice = merge.spread(answer.choice)
        value = program.value(choice)
        bound = min(answer.bound, value)
        unit, schemes = reference(program, choice), sens.candidates.choice(choice)
        gap = (value - bound) / unit if unit > 0 else 0.0
        info = {"solver": answer.solver, "relative_gap": gap, "negative_eigenvalue_share": self._mass, **searched(sens)}
        return Plan(
            layers=sens.layers,
            schemes=schemes,
            status="optimal" if gap <= CLOSED else "feasible",
            objective=value,
            bound=bound,
            objective_name=asked.objective,
            values=self.values(choice, asked.objective),
            usage={b.name: {"used": b.shown(b.use[choice].sum()), "limit": b.given} for b in asked.budgets},
            quantizer=sens.quantizer,
            fingerprint=dict(sens.fingerprint),
            activations=sens.activations_of(schemes),
            rounding=sens.provenance.rounding,
            held=sens.held,
            info=info,
        )

    def _infeasible(self, objective: str, reason: str) -> Plan:
        return Plan(
            layers=self.sens.layers,
            schemes={},
            status="infeasible",
            objective_name=objective,
            quantizer=self.sens.quantizer,
            fingerprint=dict(self.sens.fingerprint),
            info={"solver": "presolve and scip", "reason": reason},
        )


def _limited(asked: _Asked, row: int, limit: int) -> _Asked:
    """The question with another limit of one budget."""
    limits = asked.program.limits.copy()
    limits[row] = limit
    budgets = list(asked.budgets)
    budgets[row] = replace(budgets[row], limit=limit, given=budgets[row].shown(limit))
    return replace(asked, budgets=budgets, program=replace(asked.program, limits=limits))


def _what_if(
    program: Program, keep: Choice, effort: Effort, start: Choice | None, forms: dict[bytes, list[ConvexForm]]
) -> Answer:
    """Answer with the best of the forms at hand, {limits: forms}; where none comes near, with new ones, which are kept."""
    known = [form for pair in forms.values() for form in pair]
    answer = certify(program, keep, effort, start, known) if known or effort.enough is not None else None
    if answer is not None and (settled(program, answer, effort.enough) or program.limits.tobytes() in forms):
        return answer
    if answer is not None and answer.choice is not None:
        missing = program.value(answer.choice) - answer.bound
        if missing <= NEAR * reference(program, answer.choice):
            return answer
        start = answer.choice
    if len(within_reach(program, np.arange(program.size))) == program.size:
        plain = shifted(program, effort.share(0.5), tolerance=ROUGH if known else EXACT)
        forms[program.limits.tobytes()] = [plain] if known else [plain, tightened(program, plain, effort)]
        for old in list(forms)[:-MOST_FORMS]:
            del forms[old]
    return certify(program, keep, effort, start, [form for pair in forms.values() for form in pair])


def _neighbours(program: Program, keep: Choice, choice: Choice, count: int) -> list[Choice]:
    """The ``count`` least feasible choices that differ from ``choice`` by one or two of the candidates ``keep``."""
    moves = keep[~np.isin(keep, choice)]
    layer, now = program.layer[moves], choice[program.layer[moves]]
    matrix, half = program.matrix, np.diag(program.matrix) / 2
    rest = matrix[:, choice].sum(axis=1)
    rest[choice] -= 2 * half[choice]
    single = half[moves] - half[now] + rest[moves] - rest[now]
    step = matrix[np.r_[moves, now]]
    step = step[: len(moves)] - step[len(moves) :]
    pair = single[:, None] + single[None, :] + step[:, moves] - step[:, now]
    use = program.rows[:, moves] - program.rows[:, now]
    spare = program.limits - program.rows[:, choice].sum(axis=1)
    fits = (use <= spare[:, None]).all(axis=0)
    both = np.triu(layer[:, None] != layer[None, :])
    for row, left in zip(use, spare, strict=True):
        both &= row[:, None] + row[None, :] <= left
    first, second = np.nonzero(both)
    rises = np.concatenate([single[fits], pair[first, second]])
    changes = [(v,) for v in moves[fits]] + list(zip(moves[first], moves[second], strict=True))
    out = []
    for k in np.argsort(rises, kind="stable")[:count]:
        other = choice.copy()
        for v in changes[k]:
            other[program.layer[v]] = v
        out.append(other)
    return out


def given_plan(
    sens: Sensitivity, bits: Mapping[str, Scheme | str | int], objective: str = "original", **budgets: Any
) -> Plan:
    """A plan of the given schemes, priced but not solved for: uniform widths, or one of the user's own.

    Args:
        sens: the sensitivity matrix.
        bits: {layer: bits, or label of a scheme}, every layer.
        objective: what ``objective`` of the plan is measured by.
        **budgets: budgets of :func:`clado.solve` whose use is reported; they need not hold.

    Raises:
        CladoError: a layer without bits, a width that was not measured, NaN or infinity in the matrix.
    """
    choice = sens.candidates.indices(bits)
    solver = Solver(sens)
    solver.refresh(choice)
    check_known("given_plan", budgets, BUDGETS)
    rows = make_budgets(sens, SolveOptions(**budgets)) if budgets else []
    solver._report_eigenvalues(60.0)
    values = solver.values(choice, objective)
    return Plan(
        layers=sens.layers,
        schemes=sens.candidates.choice(choice),
        status="given",
        objective=values[objective],
        objective_name=objective,
        values=values,
        usage={b.name: {"used": b.shown(b.use[choice].sum()), "limit": b.given} for b in rows},
        quantizer=sens.quantizer,
        fingerprint=dict(sens.fingerprint),
        activations=sens.activations_of(bits),
        rounding=sens.provenance.rounding,
        held=sens.held,
        info=searched(sens),
    )


def searched(sens: Sensitivity) -> dict[str, Any]:
    """What a plan's average is of: the share of the model's weights that were searched, where it is known."""
    return {} if sens.searched_share is None else {"searched_share": sens.searched_share}


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
        flat, layer = sens.candidates.flat, sens.candidates.layer_of
        names = [f"({sens.layers[layer[v]].name}, {flat[v].bits if flat[v].plain else flat[v].label})" for v in worst]
        raise CladoError(
            f"solve: matrix must be finite at every allowed candidate, got NaN or infinity at (layer, bits) "
            f"{some(names, 5)}; measure them again or forbid them"
        )
    dropped: NDArray[np.bool_] = np.asarray(bad.any(axis=1))
    dropped[keep] = False
    return dropped


def _conflict(merge: Merged, budgets: list[Budget], effort: Effort) -> str:
    """Which budget would have to give, and to what, for the others to hold."""
    whole, keep = merge.program, merge.keep
    needs = []
    for k, budget in enumerate(budgets):
        others = np.arange(len(budgets)) != k
        cost = np.diag(2.0 * whole.rows[k] / whole.row_scale[k])
        relaxed = Program(cost, whole.layer, whole.rows[others], whole.limits[others])
        reach = within_reach(relaxed, keep)
        if not whole.covered(reach):
            continue
        part = relaxed.restricted(reach)
        deadline = max(effort.share(0.5), time.monotonic() + 0.2)
        choice, _, finished = scip.exact(part, linear_form(part), None, deadline, 0.0)
        if choice is not None and finished:
            least = int(whole.rows[k, reach[choice]].sum())
            needs.append(f"{budget.name} at least {budget.shown(least):.10g} (got {float(budget.given):.10g})")
    names = " and ".join(budget.name for budget in budgets)
    return f"{names} cannot hold together; with the others kept: {' or '.join(needs) or 'no single one can mend it'}"

"""A program's best choice and the proof of how good it is: heuristics, convex form, branch and bound, SCIP."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..common import require
from . import native, scip
from .products import Products
from .program import Program, within_reach, worth_keeping
from .shift import ConvexForm, convex_form, iteration_seconds, linear_form, spectral_form

SOLVERS = ("auto", "bnb", "scip", "heuristic")
LARGE = 1500  # candidates beyond which dropping the hopeless ones first takes longer than it saves
CLOSED = 1e-6  # gap at which a choice counts as optimal
ROUNDS = 3  # of tightening before branch and bound goes to the end
ITERATIONS = 100  # of the first search for a tighter form; each round has twice as many as the one before
NODES_WORK = 400_000_000  # nodes x V² before that, about half of what it costs; twice as many in each round too
NEAR_END = 0.5  # if nodes leave less than this share of what a tighter form leaves open, they go on to the end
FEWER = 0.9  # if less than this share of the candidates is left, they get a program of their own
Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Effort:
    """How hard to try: see :func:`clado.solve`.

    Attributes:
        deadline: a ``time.monotonic()`` value.
        enough: a choice whose value is at most this one ends the search, and so does a proof that there is none; None: only
            the least value will do.
    """

    deadline: float
    gap: float = 0.0
    seed: int = 0
    solver: str = "auto"
    enough: float | None = None

    def share(self, part: float) -> float:
        """The moment at which ``part`` of the time that is left will be spent."""
        now = time.monotonic()
        return now + part * max(0.0, self.deadline - now)

    def tolerance(self, value: float, unit: float) -> float:
        """By how much less than ``value`` a choice must be to be looked for; ``unit`` is its :func:`reference`."""
        closed = CLOSED / 4 * unit
        needless = 0.0 if self.enough is None else value - self.enough - closed
        return max(0.999 * self.gap * unit, closed, needless)


@dataclass(frozen=True)
class Answer:
    """A choice of candidates, a lower bound on all choices, and who did it.

    No choice and a bound of infinity: proven infeasible; with ``Effort.enough``, another bound: none was found in time.
    """

    choice: Choice | None
    bound: float
    solver: str


def certify(
    whole: Program, keep: Choice, effort: Effort, start: Choice | None = None, forms: Sequence[ConvexForm] = ()
) -> Answer:
    """The best choice of ``whole`` among the candidates ``keep``, with its bound.

    Args:
        whole: the program in any scale.
        keep: ascending candidates that may be taken, at least one of every layer.
        effort: time, gap, seed, solver.
        start: ``[L]`` candidates of ``whole`` to begin with; ignored where it is not among ``keep``.
        forms: convex forms of ``whole`` for any limits; used instead of a new one by the solver "heuristic".
    """
    reach = within_reach(whole, keep)
    if not whole.covered(reach):
        return Answer(None, math.inf, "presolve")
    program = whole.restricted(reach)
    begin = np.searchsorted(reach, start) if start is not None and np.isin(start, reach).all() else None
    largest = float(np.abs(program.matrix).max(initial=0.0))
    scale = 1.0 / largest if largest > 0 else 1.0
    work = native.QUICK * program.size if effort.solver == "heuristic" else 0
    target = -math.inf if effort.enough is None else effort.enough * scale
    incumbent = native.search(program.scaled(scale), begin, effort.seed, effort.share(0.15), target, work)
    if incumbent is None:
        incumbent, finished = _any_feasible(program, effort)
        if incumbent is None:
            late = effort.enough is None and not finished
            require(not late, "solve", "time_limit", "be longer to find any plan within the budgets", "none yet")
            return Answer(None, math.inf if finished else -math.inf, "scip")
    if meets(program, incumbent, effort.enough):
        return Answer(reach[incumbent], -math.inf, "heuristic")
    useful = np.arange(program.size) if program.size > LARGE else worth_keeping(program, program.value(incumbent))
    program, incumbent = program.restricted(useful), np.searchsorted(useful, incumbent)
    kept = reach[useful]
    diagonal = reference(program, incumbent)
    scale = 100.0 / diagonal if diagonal > 0 else scale
    known = [form.restricted(kept, form.multipliers).scaled(scale) for form in forms]
    program, choice, bound = program.scaled(scale), incumbent, -math.inf
    effort = effort if effort.enough is None else replace(effort, enough=effort.enough * scale)
    while True:
        before = choice
        choice, proven, name = _prove(program, before, effort, known)
        bound = max(bound, proven)
        # The gap is relative to the last choice, which may be smaller than what the proof was aimed by.
        reached = program.value(choice) - bound <= max(effort.gap, CLOSED) * reference(program, choice)
        enough = meets(program, choice, effort.enough)
        if reached or enough or choice is before or time.monotonic() > effort.deadline:
            return Answer(kept[choice], float(bound / scale), name)


def reference(program: Program, choice: Choice) -> float:
    """What gaps are relative to: the larger of |objective| and the sum of the magnitudes on the diagonal, halved."""
    return max(abs(program.value(choice)), float(np.abs(np.diag(program.matrix)[choice]).sum() / 2))


def meets(program: Program, choice: Choice, limit: float | None) -> bool:
    """Whether the value is at most ``limit``, rounding aside: a limit that is a choice's own value allows that choice."""
    return limit is not None and program.value(choice) <= limit + 1e-12 * reference(program, choice)


def settled(program: Program, answer: Answer, limit: float | None) -> bool:
    """Whether it is known if some choice has a value of at most ``limit``; None: never."""
    good = answer.choice is None or meets(program, answer.choice, limit)
    return good or (limit is not None and answer.bound > limit)


def shifted(program: Program, deadline: float, target: float = math.inf, tolerance: float = 1e-7) -> ConvexForm:
    """The convex form of a program: linear where nothing interacts, a cheap one where the time allows no better."""
    across = program.layer[:, None] != program.layer[None, :]
    if not program.matrix[across].any():
        return linear_form(program)
    left, step = deadline - time.monotonic(), iteration_seconds(program)
    if left > 20 * step:
        return convex_form(program, tolerance, deadline, target)
    cheap = spectral_form(program, deadline)
    cheap = replace(cheap, bound=native.prove(program, cheap, None, deadline, 0.0, nodes=1)[1])
    if left < 4 * step:
        return cheap
    form = convex_form(program, tolerance, deadline, target)
    return form if form.bound > cheap.bound else cheap


def _prove(
    program: Program, incumbent: Choice, effort: Effort, forms: Sequence[ConvexForm]
) -> tuple[Choice, float, str]:
    """A choice at least as good as ``incumbent`` and a lower bound on all choices, in the program's scale."""
    value, unit = program.value(incumbent), reference(program, incumbent)
    if program.size == program.num_layers:
        return incumbent, value, "presolve"
    tolerance = effort.tolerance(value, unit)
    if effort.solver == "heuristic" and forms:
        bound = max(native.prove(program, form, incumbent, effort.deadline, tolerance, nodes=1)[1] for form in forms)
        return incumbent, bound, "heuristic"
    form = shifted(program, effort.share(0.8), value - (CLOSED / 4 * unit if effort.enough is None else tolerance))
    if form.bound >= value - tolerance:
        return incumbent, form.bound, "heuristic"
    if effort.solver == "heuristic":
        return incumbent, max(form.bound, tightened(program, form, effort, spare=True).bound), "heuristic"
    # Without interactions it is an integer linear program with many ties: SCIP's ground.
    if effort.solver == "scip" or (effort.solver == "auto" and not form.quadratic.any()):
        best, bound, _ = scip.exact(program, form, incumbent, effort.deadline, tolerance, effort.seed)
        return _better(program, incumbent, best), max(bound, form.bound), "scip"
    best, bound = _branch_and_bound(program, form, incumbent, effort, tolerance)
    return _better(program, incumbent, best), max(bound, form.bound), "bnb"


def _branch_and_bound(
    whole: Program, form: ConvexForm, incumbent: Choice, effort: Effort, tolerance: float
) -> tuple[Choice, float]:
    """Some nodes with the form at hand; while they do not come near the end, more with a tighter form; then to the end."""
    program, choice, where, bound = whole, incumbent, np.arange(whole.size), -math.inf
    products: Products | None = None
    for k in range(ROUNDS):
        nodes = max(1, 2**k * NODES_WORK // program.size**2)
        found, proven, done, alive = native.prove(program, form, choice, effort.deadline, tolerance, nodes)
        assert found is not None
        choice, bound = found, max(bound, proven)
        if done or time.monotonic() > effort.deadline:
            return where[choice], bound
        near = program.value(choice) - proven < NEAR_END * (program.value(choice) - form.bound)
        if products is not None and near:
            break
        # What was dropped is in no choice below the incumbent less the tolerance, which no bound here exceeds.
        keep = np.union1d(alive, choice)
        if len(keep) < FEWER * program.size:
            program, choice, where = program.restricted(keep), np.searchsorted(keep, choice), where[keep]
            form, products = shifted(program, effort.share(0.5)), None
        if products is None and _tightens(program, form, effort):
            products = Products(program, form)
        if products is None:
            break
        tight = _tighter(products, ITERATIONS << k, effort)
        form = tight if tight.bound > form.bound else form
    found, proven, _, _ = native.prove(program, form, choice, effort.deadline, tolerance)
    assert found is not None
    return where[found], max(bound, proven)


def tightened(program: Program, form: ConvexForm, effort: Effort, spare: bool = False) -> ConvexForm:
    """A form of a lower objective with a better bound; ``form`` itself where none was found in time.

    Args:
        spare: the form may be one for the program's limits, or lower ones, alone.
    """
    if not _tightens(program, form, effort):
        return form
    tight = _tighter(Products(program, form, spare), ITERATIONS, effort)
    return tight if tight.bound > form.bound else form


def _tightens(program: Program, form: ConvexForm, effort: Effort) -> bool:
    """Whether there is anything to tighten, and the time for it."""
    left = effort.deadline - time.monotonic()
    return form.moments is not None and bool(form.quadratic.any()) and left > 20 * iteration_seconds(program)


def _tighter(products: Products, iterations: int, effort: Effort) -> ConvexForm:
    products.search(iterations, effort.share(0.4))
    lower, removed = products.lower()
    return replace(convex_form(lower, deadline=effort.share(0.8)), removed=removed)


def _better(program: Program, incumbent: Choice, other: Choice | None) -> Choice:
    if other is not None and program.feasible(other) and program.value(other) < program.value(incumbent):
        return other
    return incumbent


def _any_feasible(program: Program, effort: Effort) -> tuple[Choice | None, bool]:
    """Some choice within the budgets by an integer linear program, None where there is none, and whether that is known."""
    nothing = Program(np.zeros_like(program.matrix), program.layer, program.rows, program.limits)
    choice, _, finished = scip.exact(nothing, linear_form(nothing), None, effort.deadline, 0.0, effort.seed)
    return choice, finished

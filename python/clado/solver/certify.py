"""A program's best choice and the proof of how good it is: heuristics, convex form, branch and bound, SCIP."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CladoError
from . import native, scip
from .program import Program, within_reach, worth_keeping
from .shift import ConvexForm, convex_form, linear_form

SOLVERS = ("auto", "bnb", "scip", "heuristic")
CLOSED = 1e-6  # gap at which a choice counts as optimal
Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Effort:
    """How hard to try: see :func:`clado.solve`. ``deadline`` is a ``time.monotonic()`` value."""

    deadline: float
    gap: float = 0.0
    seed: int = 0
    solver: str = "auto"

    def share(self, part: float) -> float:
        """The moment at which ``part`` of the time that is left will be spent."""
        now = time.monotonic()
        return now + part * max(0.0, self.deadline - now)


@dataclass(frozen=True)
class Answer:
    """A choice of candidates (None: proven infeasible), a lower bound on all choices, and who did it."""

    choice: Choice | None
    bound: float
    solver: str


def certify(
    whole: Program, keep: Choice, effort: Effort, start: Choice | None = None, form: ConvexForm | None = None
) -> Answer:
    """The best choice of ``whole`` among the candidates ``keep``, with its bound.

    Args:
        whole: the program in any scale.
        keep: ascending candidates that may be taken, at least one of every layer.
        effort: time, gap, seed, solver.
        start: ``[L]`` candidates of ``whole`` to begin with; ignored where it is not among ``keep``.
        form: a convex form of ``whole`` for other limits; used instead of a new one by the solver "heuristic".
    """
    reach = within_reach(whole, keep)
    if len(np.unique(whole.layer[reach])) < whole.num_layers:
        return Answer(None, math.inf, "presolve")
    program = whole.restricted(reach)
    begin = np.searchsorted(reach, start) if start is not None and np.isin(start, reach).all() else None
    largest = float(np.abs(program.matrix).max(initial=0.0))
    scale = 1.0 / largest if largest > 0 else 1.0
    work = native.QUICK * program.size if effort.solver == "heuristic" else 0
    incumbent = native.search(program.scaled(scale), begin, effort.seed, effort.share(0.15), work=work)
    if incumbent is None:
        incumbent = _any_feasible(program, effort)
        if incumbent is None:
            return Answer(None, math.inf, "scip")
    useful = worth_keeping(program, program.value(incumbent))
    program, incumbent = program.restricted(useful), np.searchsorted(useful, incumbent)
    kept = reach[useful]
    diagonal = reference(program, incumbent)
    scale = 100.0 / diagonal if diagonal > 0 else scale
    known = form.restricted(kept, form.multipliers).scaled(scale) if form is not None else None
    choice, bound, name = _prove(program.scaled(scale), incumbent, effort, known)
    return Answer(kept[choice], bound / scale, name)


def reference(program: Program, choice: Choice) -> float:
    """What gaps are relative to: the larger of |objective| and the sum of the magnitudes on the diagonal, halved."""
    return max(abs(program.value(choice)), float(np.abs(np.diag(program.matrix)[choice]).sum() / 2))


def shifted(program: Program, deadline: float, target: float = math.inf) -> ConvexForm:
    """The convex form of a program; the plain linear one where nothing interacts."""
    across = program.layer[:, None] != program.layer[None, :]
    if not program.matrix[across].any():
        return linear_form(program)
    return convex_form(program, deadline=deadline, target=target)


def _prove(program: Program, incumbent: Choice, effort: Effort, form: ConvexForm | None) -> tuple[Choice, float, str]:
    """A choice at least as good as ``incumbent`` and a lower bound on all choices, in the program's scale."""
    value, unit = program.value(incumbent), reference(program, incumbent)
    if program.size == program.num_layers:
        return incumbent, value, "presolve"
    tolerance = max(effort.gap, CLOSED / 4) * unit
    if effort.solver == "heuristic" and form is not None:
        best, bound, _, _ = native.prove(program, form, incumbent, effort.deadline, tolerance, nodes=1)
        return _better(program, incumbent, best), bound, "heuristic"
    form = shifted(program, effort.share(0.8), value - CLOSED / 4 * unit)
    if form.bound >= value - tolerance or effort.solver == "heuristic":
        return incumbent, form.bound, "heuristic"
    # Without interactions it is an integer linear program with many ties: SCIP's ground.
    if effort.solver == "scip" or (effort.solver == "auto" and not form.quadratic.any()):
        best, bound, _ = scip.exact(program, form, incumbent, effort.deadline, tolerance, effort.seed)
        return _better(program, incumbent, best), max(bound, form.bound), "scip"
    best, bound, _, _ = native.prove(program, form, incumbent, effort.deadline, tolerance)
    return _better(program, incumbent, best), max(bound, form.bound), "bnb"


def _better(program: Program, incumbent: Choice, other: Choice | None) -> Choice:
    if other is not None and program.feasible(other) and program.value(other) < program.value(incumbent):
        return other
    return incumbent


def _any_feasible(program: Program, effort: Effort) -> Choice | None:
    """Some choice within the budgets by an integer linear program; None when there is none."""
    nothing = Program(np.zeros_like(program.matrix), program.layer, program.rows, program.limits)
    choice, _, finished = scip.exact(nothing, linear_form(nothing), None, effort.deadline, 0.0, effort.seed)
    if choice is None and not finished:
        raise CladoError("solve: time_limit must be longer to find any plan within the budgets, got none yet")
    return choice

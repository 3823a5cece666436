"""Plans worth measuring: the matrix is noisy, so the true loss decides among a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..artifacts import Plan, Sensitivity, uncorrected
from ..common import require
from .objectives import NAMES, errors_known
from .options import least_loss_only
from .session import Solver, solve


def shortlist(sens: Sensitivity, *, near: int = 4, time_limit: float = 60.0, **arguments: Any) -> list[Plan]:
    """Distinct plans within the budgets: the best under every objective, then the best few beside the original's.

    Where the matrix was corrected for the fit of the weights to the samples that decided them, the plan of the layers alone as
    they were measured is among them, too: where interactions are much of the loss, better single losses make no better plan.

    Args:
        sens: the sensitivity matrix.
        near: how many plans that differ from the best one under the original objective in one or two layers.
        time_limit: seconds for all of them.
        **arguments: budgets and wishes of :func:`clado.solve`, ``objective`` and ``start`` aside.

    Returns:
        At least one plan with bits, the one under the original objective first; or that one alone when it is infeasible. A plan
        that is not the best under its objective says in ``info["contender"]`` what it is.

    Raises:
        CladoError: as :func:`clado.solve`; a corrected matrix without the file of its weights, which holds the factors.
    """
    least_loss_only("shortlist", arguments)
    require("objective" not in arguments, "shortlist", "objective", "be left out: every one is tried", "one")
    require(type(near) is int and near >= 0, "shortlist", "near", "be a whole number, not negative", repr(near))
    known = errors_known(sens.stderr, sens.candidates.same_layer)
    names = ["original", *(name for name in NAMES if name != "original" and (name != "shrunk" or known))]
    solver = Solver(sens)
    measured = uncorrected(sens)
    wishes = {"time_limit": time_limit / (len(names) + (measured is not sens)), **arguments}
    plans = [solver.solve(objective=name, **wishes) for name in names]
    if not plans[0].schemes:
        return plans[:1]
    if measured is not sens:
        alone, other = plans[names.index("diagonal")], solve(measured, objective="diagonal", **wishes)
        plans.append(_named(solver.priced(other, alone, **arguments), "diagonal, uncorrected"))
    plans += [_named(plan, "near the original") for plan in solver.near(plans[0], near, **arguments)]
    return list({tuple(plan.schemes.values()): plan for plan in reversed(plans)}.values())[::-1]


def _named(plan: Plan, words: str) -> Plan:
    """A plan that says what it is where plans are listed: not the best one under its objective."""
    return replace(plan, info={**plan.info, "contender": words})


def least_alone(sens: Sensitivity, plans: Sequence[Plan]) -> int:
    """The place of the plan that costs least where layers alone cost something: it needs no pair of the matrix to hold."""
    return min(range(len(plans)), key=lambda k: sens.delta_loss[sens.candidates.indices(plans[k].schemes)].sum())

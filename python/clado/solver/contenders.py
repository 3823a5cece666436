"""Plans worth measuring: the matrix is noisy, so the true loss decides among a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..artifacts import Plan, Sensitivity
from ..common import require
from .objectives import NAMES, errors_known
from .options import least_loss_only
from .session import Solver


def shortlist(sens: Sensitivity, *, near: int = 4, time_limit: float = 60.0, **arguments: Any) -> list[Plan]:
    """Distinct plans within the budgets: the best under every objective, then the best few beside the original's.

    Args:
        sens: the sensitivity matrix.
        near: how many plans that differ from the best one under the original objective in one or two layers.
        time_limit: seconds for all of them.
        **arguments: budgets and wishes of :func:`clado.solve`, ``objective`` and ``start`` aside.

    Returns:
        At least one plan with bits, the one under the original objective first; or that one alone when it is infeasible.

    Raises:
        CladoError: as :func:`clado.solve`.
    """
    least_loss_only("shortlist", arguments)
    require("objective" not in arguments, "shortlist", "objective", "be left out: every one is tried", "one")
    require(near >= 0, "shortlist", "near", "not be negative", near)
    known = errors_known(sens.stderr, sens.candidates.same_layer)
    names = ["original", *(name for name in NAMES if name != "original" and (name != "shrunk" or known))]
    solver = Solver(sens)
    plans = [solver.solve(objective=name, time_limit=time_limit / len(names), **arguments) for name in names]
    if not plans[0].schemes:
        return plans[:1]
    plans += solver.near(plans[0], near, **arguments)
    return list({tuple(plan.schemes.values()): plan for plan in reversed(plans)}.values())[::-1]


def least_alone(sens: Sensitivity, plans: Sequence[Plan]) -> int:
    """The place of the plan that costs least where layers alone cost something: it needs no pair of the matrix to hold."""
    return min(range(len(plans)), key=lambda k: sens.delta_loss[sens.candidates.indices(plans[k].schemes)].sum())

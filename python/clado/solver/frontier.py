"""The frontier: one solve per budget, each begun with its neighbour's plan, monotone by construction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..artifacts import Plan, Sensitivity
from ..common import check_known, require
from .certify import CLOSED
from .options import AXES, SolveOptions, least_loss_only
from .session import Solver


def pareto(
    sens: Sensitivity,
    avg_bits: Sequence[float] | None = None,
    *,
    time_limit: float = 60.0,
    **arguments: Any,
) -> list[Plan]:
    """Solve for many values of one budget.

    A plan for a smaller budget is a plan for a larger one, and a bound for a larger budget is a bound for a smaller
    one; so more budget is never worse, neither in the objective nor in the bound.

    Args:
        sens: the sensitivity matrix.
        avg_bits: values of the budget; or pass ``size_mb=``, ``size_bytes=``, ``bitops=`` or ``latency_ms=`` as a
            sequence. Exactly one budget is a sequence; others are numbers that hold for every point.
        time_limit: seconds for the whole frontier.
        **arguments: as in :func:`clado.solve`.

    Returns:
        One plan per value, in ascending order of the budget.

    Raises:
        CladoError: as :func:`clado.solve`; not exactly one budget that is a non-empty sequence.
    """
    started = time.monotonic()
    check_known("pareto", arguments, SolveOptions.about())
    least_loss_only("pareto", arguments)
    budgets = {"avg_bits": avg_bits, **{name: arguments.pop(name, None) for name in AXES[1:]}}
    axes = [name for name, value in budgets.items() if isinstance(value, Sequence) and not isinstance(value, str)]
    single = [f"{name}={value}" for name, value in budgets.items() if value is not None]
    require(len(axes) == 1, "pareto", "budgets", "hold exactly one sequence of values", axes or single or "none")
    axis = axes[0]
    points = budgets.pop(axis)
    assert isinstance(points, Sequence)
    require(len(points) > 0, "pareto", axis, "not be empty", "no value")
    fixed = {name: value for name, value in budgets.items() if value is not None}
    solver, plans = Solver(sens), list[Plan]()
    for k, point in enumerate(sorted(points)):
        left = max(0.05, (started + time_limit - time.monotonic()) / (len(points) - k))
        start = plans[-1] if plans and plans[-1].bits else arguments.get("start")
        now = {**arguments, **fixed, axis: point, "start": start, "time_limit": left}
        plans.append(solver.solve(**now))
    return _share_bounds(plans)


def _share_bounds(plans: list[Plan]) -> list[Plan]:
    """A bound that is below its larger neighbour's takes the neighbour's."""
    out: list[Plan] = []
    for plan in reversed(plans):
        if out and plan.bits and out[-1].bound > plan.bound:
            bound = min(out[-1].bound, plan.objective)
            gap = plan.info["relative_gap"] * (plan.objective - bound) / (plan.objective - plan.bound or 1.0)
            info = {**plan.info, "relative_gap": gap}
            plan = replace(plan, bound=bound, status="optimal" if gap <= CLOSED else "feasible", info=info)
        out.append(plan)
    return out[::-1]

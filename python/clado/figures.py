"""Static figures (matplotlib): what a plan or a frontier looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CladoError, require
from .files import atomic_file
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_path(path: str | os.PathLike[str]) -> Path:
    """Raise unless a figure can be written there by its suffix."""
    target = Path(path)
    require(target.suffix.lower() in SUFFIXES, "figure", "path", f"end in {', '.join(SUFFIXES)}", target)
    return target


def frontier_figure(plans: Sequence[Plan]) -> Figure:
    """Predicted loss increase against the budget that varies, with what is not yet proven as a bar below each point.

    Args:
        plans: an answer of :func:`clado.pareto`; infeasible points are left out.

    Raises:
        CladoError: no plan with bits, or no matplotlib.
    """
    known = [plan for plan in plans if plan.bits]
    require(len(known) > 0, "figure", "plans", "hold at least one plan with bits", "none")
    figure = _figure()
    axes = figure.add_subplot()
    limits = {name: {plan.usage[name]["limit"] for plan in known} for name in known[0].usage}
    axis = max(limits, key=lambda name: len(limits[name]))
    budget = [plan.usage[axis]["limit"] for plan in known]
    loss = [plan.objective for plan in known]
    gaps = [max(0.0, plan.gap) for plan in known]
    axes.plot(budget, loss, color="tab:blue", linewidth=1, zorder=1)
    if any(plan.status != "optimal" for plan in known):
        axes.errorbar(budget, loss, yerr=[gaps, [0.0] * len(gaps)], fmt="none", ecolor="tab:red", label="not proven")
    for status, marker in (("optimal", "o"), ("feasible", "s")):
        points = [(b, y) for b, y, plan in zip(budget, loss, known, strict=True) if plan.status == status]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, label=status, zorder=2)
    axes.set_xlabel(axis.replace("_", " "))
    axes.set_ylabel(f"predicted loss increase, nats ({known[0].objective_name})")
    if min(loss) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, its format by suffix, whole or not at all.

    Raises:
        CladoError: another suffix.
    """
    target = check_path(path)
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:].lower(), bbox_inches="tight", dpi=150)
    return target


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CladoError("figure: matplotlib must be installed, got no such module (pip install clado[plot])") from None
    return Figure(figsize=(7, 4.5), layout="constrained")

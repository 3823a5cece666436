"""The smallest plan whose measured drop stays within a limit, by few evaluations along the frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Plan, Sensitivity
from ..common import check_known, progress_bar, require
from ..deploy import apply
from ..graph import ForwardStep
from ..profiling import LossChoice
from ..solver import AXES, SIZE, SolveOptions, Solver, least_loss_only
from .true_loss import SURE, Batch, ran, reader_of, standard_error

RESOLUTION = 1e-3  # of the range of budgets: what is nearer counts as the same
METRICS = ("top1", "kl", "cross_entropy")


@dataclass(frozen=True)
class _Measured:
    """A plan that was run: what it takes, and its mean drop with the standard error."""

    plan: Plan
    used: float
    drop: float
    stderr: float
    samples: int


def smallest_within(
    model: nn.Module,
    heldout: Iterable[Any],
    sens: Sensitivity,
    *,
    max_drop: float,
    metric: str = "top1",
    minimize: str = SIZE,
    evaluations: int = 10,
    time_limit: float = 60.0,
    forward_step: ForwardStep | None = None,
    device: str | torch.device | None = None,
    verbose: bool = True,
    **arguments: Any,
) -> Plan:
    """The smallest plan on the frontier whose measured drop below the float model is at most ``max_drop``.

    The plan of least predicted loss is measured for each of a few budgets: a drop within the limit asks for a smaller
    budget, one beyond it for a larger one. That drops fall as budgets grow is supposed, not proven; and a plan that was
    chosen for its drop on these samples drops a little more on others: judge it by samples that are not among them.

    Args:
        model: the float model.
        heldout: batches of (inputs, targets), or of inputs for "kl", that did not enter the matrix; read once.
        sens: the sensitivity matrix.
        max_drop: as a share for "top1" (0.005: half a point of accuracy), in nats for the losses.
        metric: "top1" (top-1 accuracy lost), "kl" (to the float model's outputs, no labels) or "cross_entropy" (rise of it).
        minimize: what is made least: "avg_bits", "size_mb", "size_bytes", "bitops" or "latency_ms".
        evaluations: how many plans are measured at most; ten find the budget to a thousandth of its range.
        time_limit: seconds of solving, for all budgets together.
        forward_step: as for :func:`clado.profile`; None: what ``sens`` was measured with, where it knows it.
        device: where to run; None: where the model is.
        verbose: show a progress bar.
        **arguments: budgets and wishes of :func:`clado.solve` that hold for every plan.

    Returns:
        The plan, an answer of :func:`clado.solve` to a budget of ``minimize`` with its status and bound.
        ``info["max_drop"]`` holds ``metric``, ``minimize``, ``limit``, ``drop`` and its standard error ``stderr`` (paired with
        the float model), ``samples``, ``decided`` (whether the drop is more than 1.96 standard errors below the limit) and
        ``evaluations``: ``used``, ``drop`` and ``stderr`` of every plan that was measured, in their order.

    Raises:
        CladoError: even the plan of least predicted loss drops more, or the budgets cannot hold; no data or no targets for
            the metric, as :func:`clado.solve`.
    """
    op = "smallest_within"
    check_known(op, arguments, SolveOptions.about())
    least_loss_only(op, arguments)
    require(metric in METRICS, op, "metric", f"be one of {', '.join(METRICS)}", repr(metric))
    require(minimize in AXES, op, "minimize", f"be one of {', '.join(AXES)}", repr(minimize))
    require(math.isfinite(max_drop), op, "max_drop", "be a finite number", max_drop)
    require(evaluations >= 1, op, "evaluations", "be at least 1", evaluations)
    frontier = _Frontier(sens, minimize, {**arguments, "time_limit": time_limit / (evaluations + 1)})
    step = forward_step or sens.functions.get("forward_step")
    drops = _drops(model, list(heldout), metric, step, device)
    widest = frontier.plan(frontier.most)
    require(bool(widest.schemes), op, "budgets", "fit together", widest.info.get("reason"))
    measured = [_measured(widest, minimize, drops)]
    low, best = frontier.least, measured[0]
    must = f"be at least {best.drop:.4g}, which the plan of least predicted loss drops"
    require(best.drop <= max_drop, op, "max_drop", must, f"{max_drop:.4g}")
    with progress_bar(f"measure {evaluations} plans", evaluations, "plans", verbose) as show:
        show(1)
        while len(measured) < evaluations and best.used - low > RESOLUTION * (frontier.most - frontier.least):
            limit = (low + best.used) / 2
            plan = frontier.plan(limit)
            if not plan.schemes or any(one.plan.schemes == plan.schemes for one in measured):  # that one dropped more
                low = limit
                continue
            measured.append(_measured(plan, minimize, drops))
            show(len(measured))
            if measured[-1].drop <= max_drop:
                best = measured[-1]
            else:
                low = limit
    note = {
        "metric": metric,
        "minimize": minimize,
        "limit": max_drop,
        "drop": best.drop,
        "stderr": best.stderr,
        "samples": best.samples,
        "decided": best.drop + SURE * best.stderr <= max_drop,
        "evaluations": [{"used": one.used, "drop": one.drop, "stderr": one.stderr} for one in measured],
    }
    return replace(best.plan, info={**best.plan.info, "max_drop": note})


class _Frontier:
    """Plans of least predicted loss for budgets of one kind, between the least that can be met and the most that matters."""

    def __init__(self, sens: Sensitivity, minimize: str, arguments: dict[str, Any]) -> None:
        self.solver, self.minimize, self.arguments = Solver(sens), minimize, arguments
        self.least, self.most = self.solver.extent(minimize, **arguments)

    def plan(self, limit: float) -> Plan:
        return self.solver.solve(**{**self.arguments, self.minimize: limit})


def _measured(plan: Plan, minimize: str, drops: Callable[[Plan], Tensor]) -> _Measured:
    own = drops(plan)
    return _Measured(plan, plan.usage[minimize]["used"], own.mean().item(), standard_error(own), len(own))


def _drops(
    model: nn.Module,
    batches: list[Any],
    metric: str,
    forward_step: ForwardStep | None,
    device: str | torch.device | None,
) -> Callable[[Plan], Tensor]:
    """What gives the drop of every sample, float64 ``[N]``, under a plan."""
    loss = LossChoice("cross_entropy" if metric == "cross_entropy" else "kl", op="smallest_within")
    reader = reader_of(model, loss, device, forward_step, "smallest_within")
    clean = list(ran(model, batches, reader))
    must = f"yield (inputs, targets) for {metric} (images: in one subfolder per class)"
    labelled = all(batch.targets is not None for batch in clean)
    require(metric == "kl" or labelled, "smallest_within", "heldout", must, "inputs alone")
    count = sum(len(batch.output) for batch in clean)
    require(count > 1, "smallest_within", "heldout", "yield at least 2 samples", count)

    def drops(plan: Plan) -> Tensor:
        pairs = zip(clean, ran(apply(model, plan), batches, reader), strict=True)
        return torch.cat([_drop(before, now, metric) for before, now in pairs])

    return drops


def _drop(before: Batch, now: Batch, metric: str) -> Tensor:
    """Of every sample of a batch."""
    if metric != "top1" or before.targets is None:
        return now.loss.increase_over(before.loss.reference(before.output), now.output)
    right, still = (batch.output.argmax(1).cpu().eq(before.targets.cpu()).double() for batch in (before, now))
    lost: Tensor = right - still
    return lost

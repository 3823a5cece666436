"""From single perturbations alone: without interactions, or with all of them as if changes of the output added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...graph import Runner, Variants
from ..losses import Loss
from ..share import Share
from ..sums import Sums
from .base import ALONE, Estimator, Later, Passes, Tick, groups, single_sums, single_work, singles, work_of_singles


def diagonal(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """Single loss increases only; Ω = 0 (CLADO*, the HAWQ-like baseline)."""
    z, increase, counts = None, list[Tensor](), [len(own) for own in variants]
    for layers in groups(counts, runner.held):
        found = singles(runner, variants, batch, loss, tick, share, layers, z, keep=False)
        z = found.z
        increase.append(found.increase)
    return single_sums(torch.cat(increase), share)


def additive(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """Single loss increases, and all interactions as if changes of the output added (docs/numerics.md).

    Where memory does not hold all changes, those of two groups of layers are there at a time, and later groups run again.
    """
    counts = [len(own) for own in variants]
    parts = groups(counts, runner.held)
    sums = Sums.zeros(sum(counts), variants[0][0].weight.device)
    z, increase = None, list[Tensor]()
    for k, layers in enumerate(parts):
        first = singles(runner, variants, batch, loss, tick, share, layers, z)
        z = first.z
        increase.append(first.increase)
        for others in parts[k:]:
            second = None
            if others is not layers:
                second = singles(runner, variants, batch, loss, tick, share, others, z)
            if share.leads:
                block = (first.rows, first.rows if second is None else second.rows)
                found = loss.pairs(first.z, first.delta, None if second is None else second.delta)
                sums.pair[block], sums.pair_squared[block] = found
    sums += single_sums(torch.cat(increase), share)
    return sums


def work_of_additive(passes: Passes) -> float:
    """The singles; in groups, those of later groups once more for each group before."""
    later = [part.start for part in groups(passes.counts, passes.held)[1:]]
    again = (passes.longest(single_work(passes.suffix[k:], passes.counts[k:])) for k in later)
    return work_of_singles(passes) + sum(passes.whole + more for more in again)


DIAGONAL = Estimator(diagonal, work_of_singles, grouped=True)
ADDITIVE = Estimator(additive, work_of_additive, grouped=True, closed=True)

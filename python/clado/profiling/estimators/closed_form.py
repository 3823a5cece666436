"""From single perturbations alone: without interactions, or with all of them in closed form."""

from __future__ import annotations

from typing import Any

import clado_ext

from ...graph import Runner, Variants
from ..losses import Loss
from ..share import Share
from ..sums import Sums
from .base import ALONE, Estimator, Later, Tick, single_sums, singles, work_of_singles


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
    return single_sums(singles(runner, variants, batch, loss, tick, share)[0], share)


def logit(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """Single loss increases, and all interactions in closed form as if logit changes added (docs/numerics.md)."""
    increase, logits, delta = singles(runner, variants, batch, loss, tick, share)
    sums = single_sums(increase, share)
    if share.leads:
        sums.pair, sums.pair_squared = clado_ext.pairwise_ce(logits, delta)
    return sums


DIAGONAL = Estimator(diagonal, work_of_singles)
LOGIT = Estimator(logit, work_of_singles, needs_logits=True)

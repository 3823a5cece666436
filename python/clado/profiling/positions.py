"""What it costs in accuracy to look at some positions of large outputs alone."""

from __future__ import annotations

from typing import Any

from ..graph import Runner, Variants
from .estimators.base import singles
from .losses import Loss
from .probe import nothing


def position_noise(runner: Runner, variants: Variants, batch: Any, every: Loss, some: Loss) -> float:
    """Error of a sample's loss increase by some positions, relative to that by every one: root mean squares over the widest
    changes of the first, the middle and the last layer."""
    count = runner.num_layers
    chosen = sorted({0, count // 2, count - 1})
    mine = [variants[k][:1] for k in chosen]
    wanted, got = (singles(runner.only(chosen), mine, batch, loss, nothing).increase for loss in (every, some))
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-300))

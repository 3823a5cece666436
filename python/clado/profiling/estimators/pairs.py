"""Every pair by a forward of its own: as the interaction, or as what it adds to the closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ...graph import Runner, Variants
from ..losses import Loss
from ..share import Share
from ..sums import Sums
from .base import (
    ALONE,
    Estimator,
    Later,
    Passes,
    Singles,
    Tick,
    blocks,
    joined,
    rows_of,
    single_sums,
    singles,
    stacks,
    work_of_singles,
)


def exact(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """Every pair by its own forward from the layer where it departs from a single perturbation (the paper's definition)."""
    alone = singles(runner, variants, batch, loss, tick, share)
    sums = single_sums(alone.increase, share)
    for block, closed, residual in _pairs(runner, variants, batch, loss, alone, tick, share, later):
        omega = closed + residual
        sums.pair[block] = omega.sum(-1)
        sums.pair_squared[block] = omega.square().sum(-1)
    return sums


def corrected(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """The closed form, and beside it what the exact value adds to it; for the chunks that pay for both.

    ``later``: for every layer the layers behind it that it is paired with; None: all of them.
    """
    alone = singles(runner, variants, batch, loss, tick, share)
    sums = single_sums(alone.increase, share)
    if share.leads:
        sums.pair, sums.pair_squared = loss.pairs(alone.z, alone.delta)
        sums.residual_samples += sums.samples
    sums.residual, sums.residual_squared, sums.residual_pair = sums.pair.new_zeros(3, *sums.pair.shape)
    sums.residual_closed = sums.pair.clone()
    for block, closed, residual in _pairs(runner, variants, batch, loss, alone, tick, share, later):
        sums.residual[block] = residual.sum(-1)
        sums.residual_squared[block] = residual.square().sum(-1)
        sums.residual_pair[block] = (residual * closed).sum(-1)
    return sums


def _pairs(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    alone: Singles,
    tick: Tick,
    share: Share,
    later: Later | None = None,
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """(block of the matrix, closed form, residual ``[bits of i, bits of j, N]``) of this share's pairs of layers i < j."""
    places = blocks(variants)

    def measured(both: Any) -> Any:
        """What both perturbations change, streams in front."""
        return runner.changes(loss.taken(runner.finish(both), 1), alone.z)

    state = runner.start(batch)
    behind = every_pair(runner.num_layers) if later is None else later
    counts = [len(weights) for weights in variants]
    for i in share.own(runner.num_layers, lambda: pair_work(runner.suffix_share, counts, behind)):
        if not behind[i]:
            continue
        own = places[i]
        state = runner.advance(state, i)
        branch = runner.fork(state, i, variants[i])
        for j in behind[i]:
            branch = runner.advance(branch, j)
            other = places[j]
            joint = joined([measured(runner.fork(branch, j, part)) for part in stacks(runner, variants[j])])
            joint = pytree.tree_map(partial(by_layers, counts[j], counts[i]), joint)
            first, second = (pytree.tree_map(partial(rows_of, rows), alone.delta) for rows in (own, other))
            closed, residual = loss.pair(alone.z, first, second, joint)
            yield (own, other), closed, residual
            tick()


def by_layers(later: int, earlier: int, leaf: Any) -> Any:
    """Streams ``[later, earlier]``, the later layer's candidates outermost, the other way round."""
    return leaf.reshape(later, earlier, *leaf.shape[1:]).transpose(0, 1) if isinstance(leaf, Tensor) else leaf


def every_pair(layers: int) -> Later:
    """For every layer all layers behind it."""
    return [range(i + 1, layers) for i in range(layers)]


def pair_work(suffix: Sequence[float], counts: Sequence[int], later: Later) -> list[float]:
    """Forward-equivalents of all pairs whose first layer is i, for every i; each walks up to its last layer's cut."""
    walks = (suffix[i] - suffix[max(behind)] if behind else 0.0 for i, behind in enumerate(later))
    pairs = (sum(counts[j] * suffix[j] for j in behind) for behind in later)
    return [count * (walk + rest) for count, walk, rest in zip(counts, walks, pairs, strict=True)]


def work_of_pairs(passes: Passes) -> float:
    """The singles, the prefix once more up to the cut of the last layer that has one behind it, and the pairs."""
    whole, suffix = passes.whole, passes.suffix
    later = every_pair(len(suffix)) if passes.later is None else passes.later
    walk = max((whole - share for share, behind in zip(suffix, later, strict=True) if behind), default=0.0)
    return work_of_singles(passes) + walk + passes.longest(pair_work(suffix, passes.counts, later))


EXACT = Estimator(exact, work_of_pairs, pairs=True)
CORRECTED = Estimator(
    corrected, work_of_pairs, pairs=True, closed=True, residual=True, otherwise="additive", probed_by="exact"
)

"""What estimators are made of: what one is, the single perturbations that all of them measure, and what these cost.

An estimator's function returns :class:`Sums` over the chunk's samples, so chunks add up in a fixed order and carry their own
error bars. Candidates are layer-major, bits ascending; a candidate's logit change is δ_v = logits(w + Δ_v) − z. Where ranks
share a chunk, every entry is measured on one of them and is zero on the others. The sums stay on the device: a host that asked
for them in between would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ...graph import Runner, Variants
from ...quant import Variant
from ..losses import Loss, UserLoss
from ..share import Share, longest
from ..sums import Sums

Tick = Callable[[], None]
Later = Sequence[Sequence[int]]
ALONE = Share()


@dataclass(frozen=True)
class Passes:
    """What the passes of a run cost, in forward-equivalents per sample.

    Attributes:
        whole, suffix: the share of the model's own forward that a clean pass takes, and what of it lies behind each layer's cut.
        counts: candidates of each layer.
        members: ranks that share a chunk; work is that of the one that has most to do.
        later: for every layer the layers behind it that it is paired with; None: all of them.
        slopes: what derivatives by the weights take beyond a product each (:meth:`~clado.graph.Runner.slope_share`).
    """

    whole: float
    suffix: Sequence[float]
    counts: Sequence[int]
    members: int = 1
    later: Later | None = None
    slopes: Callable[[], Sequence[float]] | None = None

    def longest(self, costs: Sequence[float]) -> float:
        """Of the rank that has most to do, of so much by layer."""
        return longest(costs, self.members)


class Measure(Protocol):
    """Sums over samples that advance together."""

    def __call__(
        self,
        runner: Runner,
        variants: Variants,
        batch: Any,
        loss: Loss,
        tick: Tick,
        share: Share = ...,
        later: Any = ...,
    ) -> Sums: ...


@dataclass(frozen=True)
class Estimator:
    """One way to the matrix.

    Attributes:
        run: measures samples that advance together; only ``run`` of one with ``pairs`` looks at ``later``.
        work: forward-equivalents per sample.
        pairs: whether every pair has a forward of its own: their stacks decide how much memory a chunk takes.
        needs_logits: whether it rests on the closed form, which has none for a user's loss.
        carries: whether it runs with differences carried in a low precision.
        residual: whether it keeps what the exact value adds to the closed form, and so may be paid for on a part of the samples.
        otherwise: what measures the samples that do not pay for it.
        probed_by: whose errors tell how it bears a low precision; None: its own.
    """

    run: Measure
    work: Callable[[Passes], float]
    pairs: bool = False
    needs_logits: bool = False
    carries: bool = True
    residual: bool = False
    otherwise: str | None = None
    probed_by: str | None = None


def blocks(variants: Variants) -> list[slice]:
    """The candidates of each layer."""
    ends = accumulate((len(own) for own in variants), initial=0)
    return [slice(first, last) for first, last in pairwise(ends)]


def singles(
    runner: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """One clean pass whose prefixes all candidates share.

    Returns:
        loss increase ``[V, N]``; clean logits ``[N, C]`` and logit changes ``[V, N, C]``, empty under a user's loss.
    """
    state, finished = runner.start(batch), []
    places, counts = blocks(variants), [len(own) for own in variants]
    own = share.own(runner.num_layers, lambda: single_work(runner.suffix_share, counts))
    for k in own:
        state = runner.advance(state, k)
        for part in stacks(runner, variants[k]):
            branch = runner.fork(state, k, part)
            finished.append(
                loss.values(runner.outputs(branch)) if isinstance(loss, UserLoss) else runner.finish(branch)
            )
        tick()
    rows, count = [v for k in own for v in range(places[k].start, places[k].stop)], sum(counts)
    if isinstance(loss, UserLoss):
        increase = torch.cat(finished) - loss.values(runner.outputs(state))
        return share.gathered(increase, rows, count), torch.empty(0), torch.empty(0)
    logits = runner.clean(state)
    delta = share.gathered(runner.changes(torch.cat(finished), logits), rows, count)
    return loss.increase(logits, delta), logits, delta


def stacks(runner: Runner, variants: Sequence[Variant]) -> Iterator[Sequence[Variant]]:
    """As many variants of a layer at a time as the runner may stack."""
    size = runner.stack or len(variants)
    return (variants[k : k + size] for k in range(0, len(variants), size))


def single_sums(increase: Tensor, share: Share = ALONE) -> Sums:
    sums = Sums.zeros(increase.shape[0], increase.device)
    sums.samples = increase.shape[1]
    if share.leads:
        sums.loss, sums.loss_squared = increase.sum(-1), increase.square().sum(-1)
    return sums


def single_work(suffix: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Forward-equivalents of each layer's perturbations."""
    return [count * share for count, share in zip(counts, suffix, strict=True)]


def work_of_singles(passes: Passes) -> float:
    """One clean pass, and every perturbation from its layer on."""
    return passes.whole + passes.longest(single_work(passes.suffix, passes.counts))

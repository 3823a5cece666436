"""From logits to the sensitivity matrix: one function per estimator, one chunk of samples at a time.

Every function returns :class:`Sums` over the chunk's samples, so chunks add up in a fixed order and carry their own error
bars. Candidates are layer-major, bits ascending; a candidate's logit change is δ_v = logits(w + Δ_v) − z. Where ranks share a
chunk, every entry is measured on one of them and is zero on the others. The sums stay on the device: a host that asked for
them in between would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clado_ext

from ..graph import Runner, Variants
from .losses import LogitLoss, Loss, UserLoss
from .share import Share
from .sums import Sums
from .work import Later, every_pair, gradient_work, pair_work, single_work

Tick = Callable[[], None]
ALONE = Share()


def diagonal(executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE) -> Sums:
    """Single loss increases only; Ω = 0 (CLADO*, the HAWQ-like baseline)."""
    return _single_sums(singles(executor, variants, batch, loss, tick, share)[0], share)


def logit(executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE) -> Sums:
    """Single loss increases, and all interactions in closed form as if logit changes added (docs/numerics.md)."""
    increase, logits, delta = singles(executor, variants, batch, loss, tick, share)
    sums = _single_sums(increase, share)
    if share.leads:
        sums.pair, sums.pair_squared = clado_ext.pairwise_ce(logits, delta)
    return sums


def exact(executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE) -> Sums:
    """Every pair by its own forward from the layer where it departs from a single perturbation (the paper's definition)."""
    increase, logits, delta = singles(executor, variants, batch, loss, tick, share)
    sums = _single_sums(increase, share)
    for block, closed, residual in _pairs(executor, variants, batch, loss, increase, logits, delta, tick, share):
        omega = closed + residual
        sums.pair[block] = omega.sum(-1)
        sums.pair_squared[block] = omega.square().sum(-1)
    return sums


def corrected(
    executor: Runner,
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
    increase, logits, delta = singles(executor, variants, batch, loss, tick, share)
    sums = _single_sums(increase, share)
    if share.leads:
        sums.pair, sums.pair_squared = clado_ext.pairwise_ce(logits, delta)
        sums.residual_samples += sums.samples
    sums.residual, sums.residual_squared, sums.residual_pair = sums.pair.new_zeros(3, *sums.pair.shape)
    sums.residual_closed = sums.pair.clone()
    for block, closed, residual in _pairs(executor, variants, batch, loss, increase, logits, delta, tick, share, later):
        sums.residual[block] = residual.sum(-1)
        sums.residual_squared[block] = residual.square().sum(-1)
        sums.residual_pair[block] = (residual * closed).sum(-1)
    return sums


def gradient(executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE) -> Sums:
    """Ω_vw ≈ ⟨∇_j L(w + Δ_v) − ∇_j L(w), Δ_w⟩ for j downstream of i: the upstream layer perturbed, the other linearised."""
    width, count = len(variants[0]), sum(map(len, variants))
    state = executor.advance(executor.start(batch), 0)
    reached: dict[str, Any] = {}

    def objective(end: Any) -> Tensor:
        if isinstance(loss, UserLoss):
            losses = [loss.losses(output) for output in executor.outputs(end)]
            reached["losses"] = torch.stack([value.detach().double() for value in losses])
            return torch.stack(losses).sum()
        outputs = executor.finish(end)
        with torch.no_grad():
            delta = outputs - reached.setdefault("logits", outputs.detach()[0])
            reached["losses"] = loss.increase(reached["logits"], delta)
            slope = loss.gradient(reached["logits"], delta)
        return (outputs * slope).sum()

    samples = state.samples
    slope: Tensor | None = None
    if isinstance(loss, LogitLoss) and loss.target is None:  # the KL divergence to the clean logits has no slope there
        reached["logits"] = executor.clean(executor.start(batch))
        base = reached["logits"].new_zeros(1, samples)
    else:
        slope = executor.products(state, variants, objective)
        base = reached["losses"]
    increase = torch.zeros(count, samples, dtype=torch.float64, device=base.device)
    sums = Sums.zeros(count, base.device)
    counts = [len(weights) for weights in variants]
    costs = partial(gradient_work, executor.suffix_share, executor.slope_share(counts), counts)
    for i in share.own(executor.num_layers, costs):
        state = executor.advance(state, i)
        branch = executor.fork(state, i, variants[i])
        own = slice(i * width, (i + 1) * width)
        if i + 1 < executor.num_layers:
            slopes = executor.products(
                executor.advance(branch, i + 1), variants, objective
            )  # [V behind i, bits of i, N]
            omega = (slopes if slope is None else slopes - slope[(i + 1) * width :]).transpose(0, 1)
            sums.pair[own, (i + 1) * width :] = omega.sum(-1)
            sums.pair_squared[own, (i + 1) * width :] = omega.square().sum(-1)
        else:
            objective(executor.advance(branch, i + 1))
        increase[own] = reached["losses"] - base
        tick()
    sums += _single_sums(increase)  # of this share's layers; zero for the others
    return sums


Estimator = Callable[..., Sums]
ESTIMATORS: dict[str, Estimator] = {
    "diagonal": diagonal,
    "logit": logit,
    "gradient": gradient,
    "corrected": corrected,
    "exact": exact,
}
CLOSED_FORM = ("logit", "corrected")  # these need logits and the KL divergence or the cross-entropy


def singles(
    executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """One clean pass whose prefixes all candidates share.

    Returns:
        loss increase ``[V, N]``; clean logits ``[N, C]`` and logit changes ``[V, N, C]``, empty under a user's loss.
    """
    state, finished = executor.start(batch), []
    width = len(variants[0])
    own = share.own(executor.num_layers, lambda: single_work(executor.suffix_share, [width] * executor.num_layers))
    for k in own:
        state = executor.advance(state, k)
        for part in _stacks(executor, variants[k]):
            branch = executor.fork(state, k, part)
            finished.append(
                loss.values(executor.outputs(branch)) if isinstance(loss, UserLoss) else executor.finish(branch)
            )
        tick()
    rows, count = [k * width + m for k in own for m in range(width)], sum(map(len, variants))
    if isinstance(loss, UserLoss):
        increase = torch.cat(finished) - loss.values(executor.outputs(state))
        return share.gathered(increase, rows, count), torch.empty(0), torch.empty(0)
    logits = executor.clean(state)
    delta = share.gathered(executor.changes(torch.cat(finished), logits), rows, count)
    return loss.increase(logits, delta), logits, delta


def _pairs(
    executor: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    increase: Tensor,
    logits: Tensor,
    delta: Tensor,
    tick: Tick,
    share: Share,
    later: Later | None = None,
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """(block of the matrix, closed form, residual ``[bits of i, bits of j, N]``) of this share's pairs of layers i < j."""
    width = len(variants[0])
    blocks = [slice(k * width, (k + 1) * width) for k in range(executor.num_layers)]
    base = loss.values(executor.outputs(executor.start(batch))) if isinstance(loss, UserLoss) else torch.empty(0)

    def measured(both: Any) -> Tensor:
        """What both perturbations change: losses ``[S, N]`` or logits ``[S, N, C]``."""
        if isinstance(loss, UserLoss):
            return loss.values(executor.outputs(both)) - base
        return executor.changes(executor.finish(both), logits)

    state = executor.start(batch)
    behind = every_pair(executor.num_layers) if later is None else later
    counts = [len(weights) for weights in variants]
    for i in share.own(executor.num_layers, lambda: pair_work(executor.suffix_share, counts, behind)):
        if not behind[i]:
            continue
        own = blocks[i]
        state = executor.advance(state, i)
        branch = executor.fork(state, i, variants[i])
        for j in behind[i]:
            branch = executor.advance(branch, j)
            other = blocks[j]
            joint = torch.cat([measured(executor.fork(branch, j, part)) for part in _stacks(executor, variants[j])])
            joint = joint.view(width, width, *joint.shape[1:]).transpose(0, 1)  # streams: bits of j outermost
            if isinstance(loss, UserLoss):
                closed = joint - increase[own, None] - increase[other]
                residual = torch.zeros_like(closed)
            else:
                closed, residual = loss.pair(logits, delta[own], delta[other], joint)
            yield (own, other), closed, residual
            tick()


def _stacks(executor: Runner, variants: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """As many variants of a layer at a time as the executor may stack."""
    size = executor.stack or len(variants)
    return (variants[k : k + size] for k in range(0, len(variants), size))


def _single_sums(increase: Tensor, share: Share = ALONE) -> Sums:
    sums = Sums.zeros(increase.shape[0], increase.device)
    sums.samples = increase.shape[1]
    if share.leads:
        sums.loss, sums.loss_squared = increase.sum(-1), increase.square().sum(-1)
    return sums

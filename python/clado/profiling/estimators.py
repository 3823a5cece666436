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

from ..graph import Runner
from .losses import LogitLoss, Loss, UserLoss
from .share import Share, longest
from .sums import Sums

Variants = Sequence[Sequence[Tensor]]
Tick = Callable[[], None]
Later = Sequence[Sequence[int]]
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
    if isinstance(loss, LogitLoss) and loss.target is None:  # the KL divergence to the clean logits has no slope there
        reached["logits"] = executor.clean(executor.start(batch))
        base, slope = reached["logits"].new_zeros(1, samples), torch.zeros(1, 1, 1, samples)
    else:
        slope = executor.products(state, variants, objective)
        base = reached["losses"]
    increase = torch.zeros(count, samples, dtype=torch.float64, device=base.device)
    sums = Sums.zeros(count, base.device)
    costs = partial(_gradient_work, executor.suffix_share, executor.slope_share(width), width)
    for i in share.own(executor.num_layers, costs):
        state = executor.advance(state, i)
        branch = executor.fork(state, i, variants[i])
        own = slice(i * width, (i + 1) * width)
        if i + 1 < executor.num_layers:
            slopes = executor.products(executor.advance(branch, i + 1), variants, objective)  # [j, bits of j, of i, N]
            omega = (slopes - slope[i + 1 :] if slope.shape[0] > 1 else slopes).flatten(0, 1).transpose(0, 1)
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


def expected_work(
    estimator: str,
    whole: float,
    suffix: Sequence[float],
    width: int,
    members: int = 1,
    later: Later | None = None,
    slopes: Sequence[float] = (),
) -> float:
    """Forward-equivalents per sample.

    Args:
        whole, suffix: the share of the model's own forward that a clean pass takes, and what of it lies behind each layer's cut.
        width: candidates of a layer.
        members: ranks that share a chunk; the work is that of the one that has most to do.
        later: as for :func:`corrected`.
        slopes: :meth:`~clado.graph.Executor.slope_share`, for ``gradient``.
    """
    if estimator == "gradient":  # one clean forward and backward
        return 2 * whole + longest(_gradient_work(suffix, slopes or [0.0] * len(suffix), width), members)
    work = whole + longest(_single_work(suffix, width), members)
    if estimator in ("diagonal", "logit"):
        return work
    later = every_pair(len(suffix)) if later is None else later
    # The pairs walk the prefix once more, up to the cut of the last layer that has one behind it.
    walk = max((whole - share for share, behind in zip(suffix, later, strict=True) if behind), default=0.0)
    return work + walk + longest(_pair_work(suffix, width, later), members)


def every_pair(layers: int) -> Later:
    """For every layer all layers behind it."""
    return [range(i + 1, layers) for i in range(layers)]


def _single_work(suffix: Sequence[float], width: int) -> list[float]:
    """Forward-equivalents of each layer's perturbations."""
    return [width * share for share in suffix]


def _pair_work(suffix: Sequence[float], width: int, later: Later) -> list[float]:
    """Forward-equivalents of all pairs whose first layer is i, for every i; each walks up to its last layer's cut."""
    walks = (suffix[i] - suffix[max(behind)] if behind else 0.0 for i, behind in enumerate(later))
    pairs = (width * sum(suffix[j] for j in behind) for behind in later)
    return [width * (walk + rest) for walk, rest in zip(walks, pairs, strict=True)]


def _gradient_work(suffix: Sequence[float], slopes: Sequence[float], width: int) -> list[float]:
    """As for pairs, by one backward by the inputs and one by the weights, from the next layer on."""
    behind = [2 * after + more for after, more in zip(suffix[1:], slopes[1:], strict=True)]
    return [width * (share + rest) for share, rest in zip(suffix, [*behind, 0.0], strict=True)]


def singles(
    executor: Runner, variants: Variants, batch: Any, loss: Loss, tick: Tick, share: Share = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """One clean pass whose prefixes all candidates share.

    Returns:
        loss increase ``[V, N]``; clean logits ``[N, C]`` and logit changes ``[V, N, C]``, empty under a user's loss.
    """
    state, finished = executor.start(batch), []
    width = len(variants[0])
    own = share.own(executor.num_layers, lambda: _single_work(executor.suffix_share, width))
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
    for i in share.own(executor.num_layers, lambda: _pair_work(executor.suffix_share, width, behind)):
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
    size = getattr(executor, "stack", None) or len(variants)
    return (variants[k : k + size] for k in range(0, len(variants), size))


def _single_sums(increase: Tensor, share: Share = ALONE) -> Sums:
    sums = Sums.zeros(increase.shape[0], increase.device)
    sums.samples = increase.shape[1]
    if share.leads:
        sums.loss, sums.loss_squared = increase.sum(-1), increase.square().sum(-1)
    return sums

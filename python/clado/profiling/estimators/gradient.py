"""The upstream layer perturbed, the downstream one linearised: one backward per candidate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...graph import Runner, Variants, first_stream
from ..losses import Loss
from ..share import Share
from ..sums import Sums
from .base import ALONE, Estimator, Later, Passes, Tick, blocks, single_sums


def gradient(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    later: Later | None = None,
) -> Sums:
    """Ω_vw ≈ ⟨∇_j L(w + Δ_v) − ∇_j L(w), Δ_w⟩ for j downstream of i: the upstream layer perturbed, the other linearised."""
    count, places = sum(map(len, variants)), blocks(variants)
    state = runner.advance(runner.start(batch), 0)
    reached: dict[str, Any] = {}

    def objective(end: Any) -> Tensor:
        outputs = loss.taken(runner.finish(end), 1)
        with torch.no_grad():
            still = pytree.tree_map(detached, outputs)
            z = reached.setdefault("z", first_stream(still))
            delta = pytree.tree_map(difference, still, z)
            reached["losses"] = loss.increase(z, delta)
            slope = loss.gradient(z, delta)
        pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(slope), strict=True)
        terms = [(a * b).sum() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
        return torch.stack(terms).sum()

    samples = state.samples
    slope: Tensor | None = None
    if loss.rests:
        reached["z"] = loss.taken(runner.clean(runner.start(batch)))
        base = torch.zeros(1, samples, dtype=torch.float64, device=variants[0][0].weight.device)
    else:
        slope = runner.products(state, variants, objective)
        base = reached["losses"]
    increase = torch.zeros(count, samples, dtype=torch.float64, device=base.device)
    sums = Sums.zeros(count, base.device)
    counts = [len(weights) for weights in variants]
    costs = partial(gradient_work, runner.suffix_share, runner.slope_share(counts), counts)
    for i in share.own(runner.num_layers, costs):
        state = runner.advance(state, i)
        branch = runner.fork(state, i, variants[i])
        own, behind = places[i], slice(places[i].stop, count)
        if i + 1 < runner.num_layers:
            # [candidates behind i, of i, N]
            slopes = runner.products(runner.advance(branch, i + 1), variants, objective)
            omega = (slopes if slope is None else slopes - slope[behind]).transpose(0, 1)
            sums.pair[own, behind] = omega.sum(-1)
            sums.pair_squared[own, behind] = omega.square().sum(-1)
        else:
            objective(runner.advance(branch, i + 1))
        increase[own] = reached["losses"] - base
        tick()
    sums += single_sums(increase)  # of this share's layers; zero for the others
    return sums


def detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def difference(now: Any, clean: Any) -> Any:
    """Of a leaf under all streams; whole numbers stay as they are."""
    return now - clean if isinstance(now, Tensor) and now.is_floating_point() else now


def gradient_work(suffix: Sequence[float], slopes: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Of each layer's perturbations: the forward, and one backward by the inputs and one by the weights, from the next on."""
    behind = [2 * after + more for after, more in zip(suffix[1:], slopes[1:], strict=True)]
    return [count * (share + rest) for count, share, rest in zip(counts, suffix, [*behind, 0.0], strict=True)]


def work_of_gradient(passes: Passes) -> float:
    """One clean forward and backward, and those of the perturbations."""
    slopes = passes.slopes() if passes.slopes else [0.0] * len(passes.suffix)
    return 2 * passes.whole + passes.longest(gradient_work(passes.suffix, slopes, passes.counts))


GRADIENT = Estimator(gradient, work_of_gradient, carries=False)

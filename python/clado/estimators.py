"""From logits to the sensitivity matrix: one function per estimator, one chunk of samples at a time.

Every function returns :class:`Sums` over the chunk's samples, so chunks add up in a fixed order and carry their own error
bars. Candidates are layer-major, bits ascending; a candidate's logit change is δ_v = logits(w + Δ_v) − z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import clado_ext

from .executor import Executor

Variants = Sequence[Sequence[Tensor]]
Tick = Callable[[], None]


@dataclass
class Sums:
    """Sums over samples, float64 on the CPU: of ΔL and its square ``[V]``, of Ω and its square ``[V, V]`` (upper triangle)."""

    loss: Tensor
    loss_squared: Tensor
    pair: Tensor
    pair_squared: Tensor
    samples: int = 0

    @staticmethod
    def zeros(candidates: int) -> Sums:
        vector = torch.zeros(candidates, dtype=torch.float64)
        matrix = torch.zeros(candidates, candidates, dtype=torch.float64)
        return Sums(vector, vector.clone(), matrix, matrix.clone())

    def __iadd__(self, other: Sums) -> Sums:
        self.loss += other.loss
        self.loss_squared += other.loss_squared
        self.pair += other.pair
        self.pair_squared += other.pair_squared
        self.samples += other.samples
        return self


def diagonal(executor: Executor, variants: Variants, batch: Tensor, target: Tensor | None, tick: Tick) -> Sums:
    """Single loss increases only; Ω = 0 (CLADO*, the HAWQ-like baseline)."""
    logits, delta = _single_deltas(executor, variants, batch, tick)
    return _single_sums(clado_ext.batched_ce(logits, delta, target))


def logit(executor: Executor, variants: Variants, batch: Tensor, target: Tensor | None, tick: Tick) -> Sums:
    """Single loss increases, and all interactions in closed form as if logit changes added (DESIGN §3.2)."""
    logits, delta = _single_deltas(executor, variants, batch, tick)
    sums = _single_sums(clado_ext.batched_ce(logits, delta, target))
    total, squares = clado_ext.pairwise_ce(logits, delta)
    sums.pair, sums.pair_squared = total.cpu(), squares.cpu()
    return sums


def exact(executor: Executor, variants: Variants, batch: Tensor, target: Tensor | None, tick: Tick) -> Sums:
    """Every pair by its own forward from the layer where it departs from a single perturbation (the paper's definition)."""
    logits = executor.forward(batch)
    width = len(variants[0])
    count = len(variants) * width
    single = torch.zeros(count, batch.shape[0], dtype=torch.float64)
    sums = Sums.zeros(count)

    def increase(outputs: Tensor) -> Tensor:
        return clado_ext.batched_ce(logits, outputs - logits, target).cpu()

    state = executor.start(batch)
    pairs: dict[tuple[int, int], Tensor] = {}
    for i in range(executor.num_layers):
        state = executor.advance(state, i)
        branch = executor.fork(state, i, variants[i])
        for j in range(i + 1, executor.num_layers):
            branch = executor.advance(branch, j)
            joint = increase(executor.finish(executor.fork(branch, j, variants[j])))
            pairs[i, j] = joint.view(width, width, -1).transpose(0, 1)  # [bits of i, bits of j, sample]
            tick()
        single[i * width : (i + 1) * width] = increase(executor.finish(branch))
        tick()

    rows = single.view(-1, width, single.shape[1])
    for (i, j), joint in pairs.items():
        omega = joint - rows[i][:, None] - rows[j][None, :]
        block = (slice(i * width, (i + 1) * width), slice(j * width, (j + 1) * width))
        sums.pair[block] = omega.sum(-1)
        sums.pair_squared[block] = omega.square().sum(-1)
    sums += _single_sums(single)
    return sums


ESTIMATORS: dict[str, Callable[[Executor, Variants, Tensor, Tensor | None, Tick], Sums]] = {
    "diagonal": diagonal,
    "logit": logit,
    "exact": exact,
}


def expected_work(estimator: str, suffix: Sequence[float], width: int) -> float:
    """Forward-equivalents per sample, from each layer's share of a forward that lies behind its cut."""
    singles = 1 + width * sum(suffix)
    if estimator != "exact":
        return singles
    return 1 + singles + width * width * sum(j * share for j, share in enumerate(suffix))


def _single_deltas(executor: Executor, variants: Variants, batch: Tensor, tick: Tick) -> tuple[Tensor, Tensor]:
    """Clean logits ``[N, C]`` and logit changes ``[V, N, C]``; one clean pass whose prefixes all candidates share."""
    state, outputs = executor.start(batch), []
    for k in range(executor.num_layers):
        state = executor.advance(state, k)
        outputs.append(executor.finish(executor.fork(state, k, variants[k])))
        tick()
    logits = executor.finish(state)[0]
    return logits, torch.cat(outputs).sub_(logits)


def _single_sums(increase: Tensor) -> Sums:
    increase = increase.cpu()
    sums = Sums.zeros(increase.shape[0])
    sums.loss, sums.loss_squared, sums.samples = increase.sum(-1), increase.square().sum(-1), increase.shape[1]
    return sums

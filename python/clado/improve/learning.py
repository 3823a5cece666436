"""Learned rounding, from rounded weights: a block to the float net's values (BRECQ, arXiv 2102.05426).

A block's inputs come through the net already rounded, its targets from the float net; codes, scales, biases and norm weights
move by Adam with steps that fall to zero, and the state of least error on samples kept apart is taken. Tried and not taken, on
EfficientNet-Lite0 at 4 bits: a last stage over scales, biases and norms of the whole net by its KL (100 batches of 1,280
augmented photographs: no better on others), weighting the errors by squared gradients of the KL (0.124 to 0.123), sign descent
(worse on every block); in one short test soft rounding that hardens and codes of depthwise convolutions gave next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..artifacts import Plan
from ..common import require
from ..graph import Block, Blocks, Live
from ..quant import LearnedWeight
from .compensation import Finished, dtype_of

CHECKS = 4  # how often a stage is judged


@dataclass(frozen=True)
class Pace:
    """How far a stage goes.

    Attributes:
        steps: batches.
        offset, scale, bias: first step sizes of Adam: of codes, of log-scales, and of biases and norm weights as a share of
            their size; 0: they stay.
    """

    steps: int
    offset: float
    scale: float
    bias: float


class Learner:
    """Weights and parameters of some layers while they are learned.

    Args:
        plan: whose layers.
        finished: where they begin.
        layers: names of those that move.
        parameters: {name: value} of the parameters that move with them, as the float model or an earlier stage has them.
        state: the float model's weights.
    """

    def __init__(
        self,
        plan: Plan,
        finished: Finished,
        layers: Sequence[str],
        parameters: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        pace: Pace,
    ) -> None:
        known, self.dtype = {layer.name: layer for layer in plan.layers}, dtype_of(plan, state)
        self.names = {name: known[name].names for name in layers}
        self.weights = {name: LearnedWeight(known[name].weight(state), finished.weights[name]) for name in layers}
        self.others = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        offsets = [weight.offset for weight in self.weights.values() if weight.offset.requires_grad]
        groups = [(offsets, pace.offset)]
        groups += [([weight.log_scale for weight in self.weights.values()], pace.scale)]
        groups += [([value], pace.bias * _size(value)) for value in self.others.values()]
        moving = [{"params": leaves, "lr": step, "first": step} for leaves, step in groups if leaves and step > 0]
        self.optimizer = torch.optim.Adam(moving, betas=(0.9, 0.99), eps=1e-12)
        self.steps = pace.steps

    def tensors(self) -> dict[str, Tensor]:
        """{parameter: value}, differentiable."""
        made = {name: weight.value().to(self.dtype) for name, weight in self.weights.items()}
        return {p: value for name, value in made.items() for p in self.names[name]} | self.others

    def step(self, done: int, loss: Tensor) -> None:
        """One step downhill; the step size falls to zero."""
        rate = 1 - done / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["first"] * rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def finished(self) -> Finished:
        """As they are now."""
        others = {name: value.detach().clone() for name, value in self.others.items()}
        return Finished({name: weight.quantized() for name, weight in self.weights.items()}, others)


def learn_block(
    blocks: Blocks,
    block: Block,
    plan: Plan,
    starts: Sequence[Finished],
    pairs: Sequence[tuple[Live, Live]],
    apart: Sequence[tuple[Live, Live]],
    state: Mapping[str, Tensor],
    pace: Pace,
    seed: int,
) -> Finished:
    """All weights, with the state of a block's layers that is best by samples kept apart.

    Args:
        blocks: the float model; block: one of its blocks.
        plan: which layers.
        starts: all weights, in several ways: learning begins at the best, which is taken where it finds nothing better.
        pairs: some samples each, before the block in the rounded net, behind it in the float net; apart: others that judge.
        state: the float model's parameters and buffers.
        pace: how far it goes.
        seed: of the order of samples.
    """
    last, dtype = block is blocks.blocks[-1], dtype_of(plan, state)

    def error(pair: tuple[Live, Live], given: Mapping[str, Tensor]) -> Tensor:
        found, wanted = blocks.run(block, pair[0], given), pair[1]
        if last:
            return gap(blocks.outputs(found), blocks.outputs(wanted))
        return relative_error(found.tensors, wanted.tensors)

    def judged(given: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(error(pair, given).item() for pair in apart)

    losses = [judged(start.tensors(plan, dtype)) for start in starts]
    start = starts[losses.index(min(losses))]
    own = {name: start.others.get(name, state[name]) for name in block.parameters if state[name].is_floating_point()}
    layers = [layer.name for layer in block.layers if layer.name in start.weights]
    learner = Learner(plan, start, layers, own, state, pace)
    given = start.tensors(plan, dtype)  # a weight of an earlier block may be used again
    best, least, order = start, min(losses), list[int]()
    draw = torch.Generator().manual_seed(seed)
    for step in range(pace.steps):
        order = order or torch.randperm(len(pairs), generator=draw).tolist()
        with torch.enable_grad():
            learner.step(step, error(pairs[order.pop()], given | learner.tensors()))
        if (step + 1) % -(-pace.steps // CHECKS) == 0 or step + 1 == pace.steps:
            now = judged(given | learner.tensors())
            if now < least:
                best, least = start.plus(learner.finished()), now
    return best


def gap(found: Any, wanted: Any) -> Tensor:
    """Mean KL to the float net's logits ``[N, C]``, C ≥ 2; of other outputs the squared error relative to their squares."""
    if isinstance(wanted, Tensor) and wanted.is_floating_point() and wanted.dim() == 2 and wanted.shape[1] > 1:
        clean = wanted.float().log_softmax(1)
        terms = clean.exp() * (clean - found.float().log_softmax(1))
        value: Tensor = torch.where(clean.isneginf(), 0.0, terms).sum(1).mean()  # a class that is masked adds nothing
        return value
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
        if b.is_floating_point()
    ]
    require(len(pairs) > 0, "finish", "model", "return numbers that are not whole", "none")
    return relative_error([a for a, _ in pairs], [b for _, b in pairs])


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Σ ‖y − t‖² / ‖t‖² over the tensors of a block's end."""
    parts = [(y - t).square().sum() / t.square().sum().clamp_min(1e-30) for y, t in zip(found, wanted, strict=True)]
    return torch.stack(parts).sum()


def _size(value: Tensor) -> float:
    """Root mean square, what a step is a share of."""
    return max(value.detach().square().mean().sqrt().item(), 1e-3)

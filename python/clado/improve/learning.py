"""Learned rounding, from a plan's rounded weights: block by block to the float net's values (BRECQ, arXiv 2102.05426).

A block's inputs come through the net already rounded, its targets from the float net; codes, scales, biases and norm weights
move by Adam with steps that fall to zero, and the state of least error on samples kept apart is taken. Tried and not taken, on
EfficientNet-Lite0 at 4 bits: a last stage over the whole net by its KL (0.123 to 0.120 for as much time again, and worse with
larger steps), weighting the errors by squared gradients of the KL (0.124 to 0.123), sign descent (worse on every block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Plan
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
        self.weights = {
            name: LearnedWeight(known[name].rows(state[known[name].names[0]]), finished.weights[name])
            for name in layers
        }
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


def learn_blocks(
    blocks: Blocks,
    plan: Plan,
    start: Finished,
    parts: Sequence[Live],
    apart: Sequence[Live],
    state: Mapping[str, Tensor],
    pace: Pace,
    seed: int,
    skip: int,
    done: Callable[[int, Finished], None],
) -> Finished:
    """Learn block after block.

    Args:
        blocks: the float model.
        plan: which layers.
        start: their rounded weights.
        parts, apart: samples to learn from and to judge by, some each, before the first block.
        state: the float model's parameters and buffers.
        pace: of a block.
        seed: of the order of samples.
        skip: blocks that are done already, as an interrupted call left them in ``start``.
        done: called after every block, with how many are done and the weights so far.
    """
    known = Finished(dict(start.weights), dict(start.others))
    clean, rounded = [[*parts, *apart] for _ in range(2)]
    dtype = dtype_of(plan, state)
    given = known.tensors(plan, dtype)
    for index, block in enumerate(blocks.blocks):
        layers = [layer.name for layer in block.layers if layer.name in known.weights and index >= skip]
        targets = [blocks.run(block, live, {}) for live in clean]
        if layers:
            better = _learn_block(blocks, block, plan, known, layers, (rounded, targets, len(parts)), state, pace, seed)
            known.take(better)
            given |= better.tensors(plan, dtype)
        rounded = [blocks.run(block, live, given) for live in rounded]
        clean = targets
        done(index + 1, known)
    return known


def _learn_block(
    blocks: Blocks,
    block: Block,
    plan: Plan,
    known: Finished,
    layers: Sequence[str],
    pairs: tuple[Sequence[Live], Sequence[Live], int],
    state: Mapping[str, Tensor],
    pace: Pace,
    seed: int,
) -> Finished:
    """The best state of a block's layers by the samples kept apart; the first one where none is better."""
    inputs, targets, count = pairs
    own = {name: known.others.get(name, state[name]) for name in block.parameters if state[name].is_floating_point()}
    learner = Learner(plan, known, layers, own, state, pace)
    fixed = {name: value for name, value in known.others.items() if name not in learner.others}

    def gap(k: int, given: Mapping[str, Tensor]) -> Tensor:
        return relative_error(blocks.run(block, inputs[k], {**fixed, **given}).tensors, targets[k].tensors)

    def judged() -> float:
        with torch.no_grad():
            given = learner.tensors()
            return sum(gap(k, given).item() for k in range(count, len(inputs)))

    return _descend(learner, gap, judged, count, seed)


def _descend(
    learner: Learner,
    gap: Callable[[int, Mapping[str, Tensor]], Tensor],
    judged: Callable[[], float],
    count: int,
    seed: int,
) -> Finished:
    """Go downhill over batches in a seeded order; the state that is judged best, the first one among them."""
    order: list[int] = []
    draw = torch.Generator().manual_seed(seed)
    best, least = learner.finished(), judged()
    for step in range(learner.steps):
        order = order or torch.randperm(count, generator=draw).tolist()
        with torch.enable_grad():
            loss = gap(order.pop(), learner.tensors())
            learner.step(step, loss)
        if (step + 1) % -(-learner.steps // CHECKS) == 0 or step + 1 == learner.steps:
            now = judged()
            if now < least:
                best, least = learner.finished(), now
    return best


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Σ ‖y − t‖² / ‖t‖² over the tensors of a block's end."""
    parts = [(y - t).square().sum() / t.square().sum().clamp_min(1e-30) for y, t in zip(found, wanted, strict=True)]
    return torch.stack(parts).sum()


def _size(value: Tensor) -> float:
    """Root mean square, what a step is a share of."""
    return max(value.detach().square().mean().sqrt().item(), 1e-3)

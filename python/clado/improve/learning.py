"""Learned rounding, from rounded weights: a block to the float net's values (BRECQ, arXiv 2102.05426), then the whole net.

A block's inputs come through the net already rounded, its targets from the float net; codes, scales, biases and norm weights
move by Adam with steps that fall to zero, and the state of least error on samples kept apart is taken. Then all of them move
together, in steps a twentieth as large, towards the float net's outputs. Tried and not taken, on EfficientNet-Lite0 at 4 bits:
scales, biases and norms of the whole net without codes (no better on others), the whole net in steps six times as large (0.127
to 0.127, where these come to 0.122), with every block's error added to its loss (0.1212 beside 0.1219), weighting a block's
errors by squared gradients of the KL (0.124 to 0.123), sign descent (worse on every block); in one short test soft rounding that
hardens and codes of depthwise convolutions gave next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..artifacts import Plan
from ..common import require
from ..graph import Block, Blocks, Live
from ..quant import LearnedWeight
from .compensation import Finished, dtype_of

CHECKS = 4  # how often a stage is judged
Tensors = dict[str, Tensor]  # {parameter: value}
Judge = Callable[[Tensors], float]


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

    def tensors(self) -> Tensors:
        """Differentiable."""
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

    def error(pair: tuple[Live, Live], given: Tensors) -> Tensor:
        found, wanted = blocks.run(block, pair[0], given), pair[1]
        if last:
            return gap(blocks.outputs(found), blocks.outputs(wanted))
        return relative_error(found.tensors, wanted.tensors)

    def judged(given: Tensors) -> float:
        with torch.no_grad():
            return sum(error(pair, given).item() for pair in apart)

    losses = [judged(start.tensors(plan, dtype)) for start in starts]
    start = starts[losses.index(min(losses))]
    layers = [layer.name for layer in block.layers if layer.name in start.weights]
    learner = Learner(plan, start, layers, _own(block.parameters, start, state), state, pace)
    known = start.tensors(plan, dtype)  # a weight of an earlier block may be used again
    moved = _descend(learner, lambda pair, own: error(pair, known | own), pairs, pace, seed)
    return _best(start, min(losses), moved, lambda own: judged(known | own))


def learn_net(
    blocks: Blocks,
    plan: Plan,
    start: Finished,
    parts: Sequence[Live],
    judged: Judge,
    state: Mapping[str, Tensor],
    pace: Pace,
    seed: int,
    done: Callable[[int], None],
) -> Finished:
    """All weights and parameters moved together towards the float net's outputs; the state that ``judged`` likes best.

    A step holds what enters every block, for one batch, and what one block keeps for its gradients.

    Args:
        blocks: the float model.
        plan: which layers.
        start: where they begin; it is taken where nothing better is found.
        parts: samples that decide, some each, before the first block.
        judged: the loss under given parameters, on other samples.
        state: the float model's parameters and buffers.
        pace: how far it goes.
        seed: of the order of samples.
        done: called after every step with how many are done.
    """
    names = dict.fromkeys(name for block in blocks.blocks for name in block.parameters)
    learner = Learner(plan, start, list(start.weights), _own(names, start, state), state, pace)
    known = start.tensors(plan, dtype_of(plan, state))
    pairs = [(live, outputs_of(blocks, live, {})) for live in parts]

    def error(pair: tuple[Live, Any], own: Tensors) -> Tensor:
        return gap(outputs_of(blocks, pair[0], known | own), pair[1])

    moved = _descend(learner, error, pairs, pace, seed, done)
    return _best(start, judged(known), moved, lambda own: judged(known | own))


def outputs_of(blocks: Blocks, live: Live, given: Tensors) -> Any:
    """The model's outputs from the values before its first block; where derivatives are recorded, a block is run once more for
    its own."""
    for block in blocks.blocks:
        if torch.is_grad_enabled():
            live = checkpoint(blocks.run, block, live, given, use_reentrant=False, preserve_rng_state=False)
        else:
            live = blocks.run(block, live, given)
    return blocks.outputs(live)


def _own(names: Iterable[str], start: Finished, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that can be learned, as they are so far."""
    return {name: start.others.get(name, state[name]) for name in names if state[name].is_floating_point()}


def _descend(
    learner: Learner,
    error: Callable[[tuple[Any, Any], Tensors], Tensor],
    pairs: Sequence[tuple[Any, Any]],
    pace: Pace,
    seed: int,
    done: Callable[[int], None] = lambda steps: None,
) -> Iterator[Learner]:
    """Steps downhill on one pair after the other, in an order drawn anew for every round; stops wherever it is to be judged."""
    draw, order = torch.Generator().manual_seed(seed), list[int]()
    for step in range(pace.steps):
        order = order or torch.randperm(len(pairs), generator=draw).tolist()
        with torch.enable_grad():
            learner.step(step, error(pairs[order.pop()], learner.tensors()))
        done(step + 1)
        if (step + 1) % -(-pace.steps // CHECKS) == 0 or step + 1 == pace.steps:
            yield learner


def _best(start: Finished, least: float, moved: Iterable[Learner], judged: Judge) -> Finished:
    """The state on the way whose loss is below ``least``, and below all others'; else ``start``."""
    best = start
    for learner in moved:
        with torch.no_grad():
            loss = judged(learner.tensors())
        if loss < least:
            best, least = start.plus(learner.finished()), loss
    return best


def gap(found: Any, wanted: Any) -> Tensor:
    """Mean KL to the float net's logits ``[N, C]``, C ≥ 2; of other outputs the squared error relative to their squares."""
    return gaps(found, wanted).mean()


def gaps(found: Any, wanted: Any) -> Tensor:
    """The same of every sample, ``[N]``: its squared error beside the mean square of a sample."""
    if isinstance(wanted, Tensor) and wanted.is_floating_point() and wanted.dim() == 2 and wanted.shape[1] > 1:
        clean = wanted.float().log_softmax(1)
        terms = clean.exp() * (clean - found.float().log_softmax(1))
        values: Tensor = torch.where(clean.isneginf(), 0.0, terms).sum(1)  # a class that is masked adds nothing
        return values
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
        if b.is_floating_point()
    ]
    require(len(pairs) > 0, "finish", "model", "return numbers that are not whole", "none")
    parts = [(y - t).square().reshape(len(t), -1).sum(1) * (len(t) / _squares(t)) for y, t in pairs]
    return torch.stack(parts).sum(0)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Σ ‖y − t‖² / ‖t‖² over the tensors of a block's end."""
    return torch.stack([(y - t).square().sum() / _squares(t) for y, t in zip(found, wanted, strict=True)]).sum()


def _squares(value: Tensor) -> Tensor:
    return value.square().sum().clamp_min(1e-30)


def _size(value: Tensor) -> float:
    """Root mean square, what a step is a share of."""
    return max(value.detach().square().mean().sqrt().item(), 1e-3)

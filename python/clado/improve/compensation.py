"""Compensated rounding of a plan in the order of the forward: every layer makes up for the errors of those before it.

A layer's inputs come through the layers already rounded, its targets from the float net. With x the clean and x̃ the rounded
input, ‖W x − Q x̃‖² is least, before rounding, for W E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹; that weight is rounded under the moments of x̃
(GPTAQ, arXiv 2504.02692, has the same target). The mean error goes into the bias, or the running mean of the batch norm behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Plan
from ..graph import Block, Blocks, Live, PairSums, Use
from ..quant import Quantized, compensated

DAMPING = 0.1  # of the mean second moment, for the weight before it is rounded: towards the float one


@dataclass(frozen=True)
class Finished:
    """A plan's weights on the way.

    Attributes:
        weights: {layer: its weight as it ships}.
        others: {parameter or buffer: its value}, adapted with them.
    """

    weights: dict[str, Quantized]
    others: dict[str, Tensor]

    def packed(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        """{(layer, format): the weight as it is stored}, on the CPU."""
        return {(name, held.number.name): held.cpu().packed() for name, held in self.weights.items()}

    def plus(self, newer: Finished) -> Finished:
        """With what is newer in the place of what was there."""
        return Finished(self.weights | newer.weights, self.others | newer.others)

    def without(self, names: Collection[str]) -> Finished:
        """With the float model's own values of some parameters."""
        return Finished(self.weights, {name: value for name, value in self.others.items() if name not in names})

    def held_by(self, plan: Plan, dtypes: Mapping[str, torch.dtype]) -> Finished:
        """As a model of these dtypes holds it, by the name of parameter or buffer."""
        owner = {layer.name: layer.names[0] for layer in plan.layers}
        weights = {name: held.held_by(dtypes[owner[name]]) for name, held in self.weights.items()}
        return Finished(weights, {name: value.to(dtypes[name]).to(value.dtype) for name, value in self.others.items()})

    def tensors(self, plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
        """{parameter or buffer: value}, dequantized."""
        names = {layer.name: layer.names for layer in plan.layers}
        made = {name: held.values(dtype) for name, held in self.weights.items()}
        return {p: value for name, value in made.items() for p in names[name]} | self.others


def compensate_block(
    blocks: Blocks,
    block: Block,
    plan: Plan,
    start: Finished,
    pairs: Sequence[tuple[Live, Live]],
    state: Mapping[str, Tensor],
) -> Finished:
    """Round the layers of a block one after the other.

    Args:
        blocks: the float model; block: one of its blocks.
        plan: which layers, and their formats.
        start: all weights; a layer whose first use is no matrix product or convolution keeps its own.
        pairs: some samples each before the block, in the float net and in the rounded one.
        state: the float model's parameters and buffers, on its device.
    """
    chosen, dtype, new = plan.chosen, dtype_of(plan, state), Finished({}, {})
    given = start.tensors(plan, dtype)
    for layer in block.layers:
        if layer.name not in chosen:
            continue
        absorbs = blocks.absorbs(layer)
        entering = ((blocks.entering(block, layer, a, {}), blocks.entering(block, layer, b, given)) for a, b in pairs)
        inputs = _Inputs.of(((*a, b[1]) for a, b in entering if a is not None and b is not None), absorbs is not None)
        if inputs is None:
            continue
        weight = layer.weight(state)
        held = compensated(inputs.target(weight), chosen[layer.name].number, plan.quantizer, inputs.moments, layer.name)
        now = Finished({layer.name: held}, {})
        if absorbs is not None:
            name, sign = absorbs
            shift = inputs.shift(weight, held.values(torch.float32))
            now.others[name] = (state[name].double() + sign * shift).to(state[name].dtype)
        new = new.plus(now)
        given |= now.tensors(plan, dtype)
    return new


def dtype_of(plan: Plan, state: Mapping[str, Tensor]) -> torch.dtype:
    """Of the model's weights."""
    return state[plan.layers[0].names[0]].dtype


@dataclass(frozen=True)
class _Inputs:
    """What two nets give to the same layer, over all samples.

    Attributes:
        moments: float64 ``[G, K, K]`` of the rounded net's, around their mean where a shift is taken up.
        products: of the clean one's with the rounded one's, likewise.
        means: ``[G, K]`` of the clean one and of the rounded one.
    """

    moments: Tensor
    products: Tensor
    means: tuple[Tensor, Tensor]

    @staticmethod
    def of(pairs: Iterable[tuple[Use, Tensor, Tensor]], centered: bool) -> _Inputs | None:
        sums = None
        for use, clean, rounded in pairs:
            sums = sums or PairSums(use)
            sums.add(clean, rounded)
        if sums is None:
            return None
        products, moments, *means = sums.moments(centered)
        moments.diagonal(dim1=1, dim2=2).clamp_(min=0.0)  # zero but for what a difference lost
        return _Inputs(moments, products, (means[0], means[1]))

    def target(self, weight: Tensor) -> Tensor:
        """The weight that does on rounded inputs what ``weight`` does on clean ones, as far as one can."""
        rows = weight.double().reshape(len(self.moments), -1, self.moments.shape[-1])
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(1)
        added = torch.diag_embed((DAMPING * torch.where(mean > 0, mean, 1.0))[:, None].expand(-1, rows.shape[-1]))
        wanted = rows @ (self.products + added)
        found: Tensor = torch.linalg.solve(self.moments + added, wanted, left=False)
        return found.reshape(weight.shape).to(weight.dtype)

    def shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """``[outputs]``: by how much the mean output rises."""
        groups, inputs = len(self.moments), self.moments.shape[-1]
        before, after = (w.double().reshape(groups, -1, inputs) for w in (weight, rounded))
        one, other = self.means
        return ((after @ other[:, :, None]) - (before @ one[:, :, None])).reshape(-1)

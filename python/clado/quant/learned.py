"""A rounded weight that is learned: its scales, and which code an element takes, by gradients that pass straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import require
from .integers import Integer
from .numbers import Quantized
from .scaling import held_by

# How far from its code an element begins at most: the first steps, which are noise, then change no code.
INSIDE = 0.3
# Inputs of an output channel that its codes need to be learned: with fewer (depthwise convolutions) one code is felt by all that
# follows, and a handful of changes undid everything on EfficientNet-Lite0. Scales and biases are learned all the same.
LEAST_INPUTS = 64


class LearnedWeight:
    """``q = (clamp(round(u + v)) − zero point) · scale · e^g``: offsets v and log-scales g are learned (AutoRound, arXiv
    2309.05516; AdaRound, 2004.10568).

    Args:
        weight: the float weight, of any shape.
        start: where learning begins.

    Attributes:
        offset: v, float32 ``[rows, columns]``, a leaf that is learned where an output channel has inputs enough.
        log_scale: g, float32 ``[rows, groups]``, a leaf.

    Raises:
        CladoError: a format that is no integer.
    """

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        number = start.number
        known = isinstance(number, Integer)
        require(known, "finish", "plan", "hold integer weights for learned rounding", number.name)
        self.start, self.shape, self._dtype = start, tuple(weight.shape), weight.dtype
        self.low, self.high = -(2.0 ** (number.bits - 1)), 2.0 ** (number.bits - 1) - 1
        codes = start.codes.float()
        self.columns = codes.shape[1]
        zero = start.zero_point
        self._zero = None if zero is None else self._spread(zero.float())
        self._scale = start.scale.float()
        scaled = weight.detach().float().reshape(codes.shape) / self._spread(self._scale)
        scaled = scaled if self._zero is None else scaled + self._zero
        self._centre = torch.minimum(torch.maximum(scaled, codes - INSIDE), codes + INSIDE)
        self.offset = torch.zeros_like(codes)
        inputs = weight[0].numel()
        if inputs >= LEAST_INPUTS:
            self.offset.requires_grad_()
        self.log_scale = torch.zeros_like(self._scale).requires_grad_()

    def value(self) -> Tensor:
        """The weight, float32, differentiable by both leaves."""
        moved = self._centre + self.offset
        codes = (moved + (moved.round() - moved).detach()).clamp(self.low, self.high)
        steps = codes if self._zero is None else codes - self._zero
        return (steps * self._spread(self._scales())).view(self.shape)

    def quantized(self) -> Quantized:
        """As it ships."""
        with torch.no_grad():
            codes = (self._centre + self.offset).round().clamp(self.low, self.high).to(torch.int8)
            scales = self.start.scales._replace(scale=self._scales())
        return Quantized(self.start.number, self.shape, codes, scales)

    def _scales(self) -> Tensor:
        """``[rows, groups]``; the gradient passes straight through their rounding for a weight in half precision."""
        found = self._scale * self.log_scale.exp()
        return found + (held_by(self._dtype, found.detach()) - found.detach())  # the sum is exact: they are close

    def _spread(self, scales: Tensor) -> Tensor:
        """``[rows, groups]`` as ``[rows, columns]``, or what broadcasts to it."""
        group = self.start.scales.group_size
        return scales.repeat_interleave(group, 1)[:, : self.columns] if group > 0 else scales

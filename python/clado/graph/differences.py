"""Values as x + d: x from the clean forward, which all perturbations share, d their difference to it, stacked over streams.

A value that no perturbation has reached has no difference and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Captured, evaluate, is_size
from .cuts import Cuts
from .precision import Precision
from .streams import batch_dim, of_stream, stacked


@dataclass(frozen=True)
class Unsplit:
    """A stacked value without a difference: indices, masks, sizes."""

    value: Any


class Clean:
    """What all perturbations share: constants, and the values of the clean forward of a batch.

    Attributes:
        constants: of the graph, by node; ``varying``: the nodes whose values depend on the input.
        perturbable: whether a node reads a layer's weight, itself or through constants.
        precision: how products round.
        size: what an integer node is at a batch size.
        values: x by node; ``samples``: N.
        attention: of every attention its scores, their softmax, and queries, keys and values as they enter products.
    """

    def __init__(self, captured: Captured, cuts: Cuts, precision: Precision) -> None:
        self.constants, self.precision = captured.constants, precision
        self.perturbable, self.size = cuts.weights, cuts.size
        self.varying = {*captured.nodes, *captured.inputs}
        self.values: dict[Node, Any] = {}
        self.samples = 0
        self.attention: dict[Node, tuple[Tensor, ...]] = {}
        self._operands: dict[Node, Tensor] = {}

    def of_batch(self, values: dict[Node, Any], samples: int) -> None:
        """Take another batch's values."""
        self.values, self.samples, self.attention = values, samples, {}

    def operand(self, weight: Node) -> Tensor:
        """A clean weight as it enters products."""
        if weight not in self._operands:
            self._operands[weight] = self.precision.operand(self.constants[weight])
        return self._operands[weight]


class Differences:
    """The values of stacked streams at a moment of the forward.

    Attributes:
        clean: x.
        d: differences by node: tensors, :class:`Unsplit`, or tuples of these and None. A node that is missing is clean.
        streams: how many are stacked.
    """

    def __init__(self, clean: Clean, d: dict[Any, Any], streams: int) -> None:
        self.clean, self.d, self.streams = clean, d, streams

    def x(self, node: Node) -> Any:
        """The clean value of a node, for one stream."""
        return self.clean.values[node]

    def moved(self, node: Any) -> bool:
        """Whether a perturbation has reached a node."""
        return self.d.get(node) is not None

    def varies(self, argument: Any) -> bool:
        """Whether an argument is a node whose value depends on the input."""
        return argument in self.clean.varying

    def repeated(self, node: Node) -> Any:
        """The clean value of a node under every stream."""
        return repeated(self.x(node), node.meta["val"], self.streams)

    def total(self, node: Node) -> Any:
        """x + d of a node under every stream."""
        found = self.d.get(node)
        return self.repeated(node) if found is None else self._sum(found, self.x(node), node.meta["val"])

    def without_clean(self, total: Any, node: Node) -> Any:
        """d from x + d of a node."""
        return self._subtract(total, self.x(node), node.meta["val"])

    def linearly(self, node: Node) -> Any:
        """Apply a linear op to the differences of its arguments, zero where there is none."""

        def value(argument: Node) -> Any:
            if self.varies(argument):
                found = self.d.get(argument)
                return torch.zeros_like(self.repeated(argument)) if found is None else found
            if is_size(argument):
                return self.clean.size(argument, self.clean.samples * self.streams)
            return self.clean.constants[argument]

        return evaluate(node, value)

    def of_stream(self, node: Node, stream: int) -> Any:
        """One stream's part of a node's difference."""
        value, meta = self.d[node], node.meta["val"]

        def part(v: Any, m: Any) -> Any:
            if isinstance(v, Unsplit):
                return Unsplit(of_stream(v.value, m, stream, self.streams))
            return None if v is None else of_stream(v, m, stream, self.streams)

        if isinstance(value, tuple):
            return tuple(part(v, m) for v, m in zip(value, meta, strict=True))
        return part(value, meta)

    def _sum(self, d: Any, x: Any, meta: Any) -> Any:
        if isinstance(meta, (tuple, list)):
            parts = d if isinstance(d, tuple) else (None,) * len(meta)
            return tuple(self._sum(p, c, m) for p, c, m in zip(parts, x, meta, strict=True))
        if isinstance(d, Unsplit):
            return d.value
        if d is None:
            return stacked([x] * self.streams, meta)
        dim = batch_dim(meta)
        if dim is None:
            return d + x
        return (d.unflatten(dim, (self.streams, -1)) + x.unsqueeze(dim)).flatten(dim, dim + 1)

    def _subtract(self, total: Any, x: Any, meta: Any) -> Any:
        if isinstance(meta, (tuple, list)):
            return tuple(self._subtract(r, c, m) for r, c, m in zip(total, x, meta, strict=True))
        if not isinstance(total, Tensor) or not total.is_floating_point():
            return Unsplit(total)
        dim = batch_dim(meta)
        if dim is None:
            return total - x
        total = total.unflatten(dim, (self.streams, -1)) - x.unsqueeze(dim)
        return total.flatten(dim, dim + 1)


def repeated(value: Any, meta: Any, times: int) -> Any:
    """A value, or a difference, stacked so many times."""
    if value is None:
        return None
    if isinstance(value, Unsplit):
        return Unsplit(stacked([value.value] * times, meta))
    if isinstance(value, tuple):
        return tuple(repeated(v, m, times) for v, m in zip(value, meta, strict=True))
    return stacked([value] * times, meta)

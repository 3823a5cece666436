"""A captured graph as a row of blocks that run one after the other, under weights that the caller may change and learn.

A block holds a few layers and ends where a single tensor lives, the smallest at hand (between residual blocks, say); where a
model has no such place for long, it ends before a layer, whatever lives there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..quant import Layer
from .capture import Captured, evaluate, is_size
from .cuts import Cuts
from .executor import Executor
from .moments import Use
from .runner import Runner
from .streams import batch_dim, tensors

MOST_LAYERS = 4  # of a block, unless a single tensor lives nowhere inside: a transformer block has four
Weights = Mapping[str, Tensor]  # {parameter or buffer: its value}


@dataclass(frozen=True)
class Block:
    """Nodes ``first`` to ``last`` - 1.

    Attributes:
        layers: those whose weight is first used in it.
        parameters: parameters that it reads, layers' weights and all buffers aside.
    """

    first: int
    last: int
    layers: tuple[Layer, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Live:
    """Live values of some samples before a block."""

    values: Mapping[Node, Any]
    samples: int

    @property
    def tensors(self) -> list[Tensor]:
        """Those that hold numbers."""
        return [tensor for tensor in tensors(list(self.values.values())) if tensor.is_floating_point()]


class Blocks:
    """The blocks of a captured graph.

    Args:
        captured: the graph; cuts: its cuts.
    """

    def __init__(self, captured: Captured, cuts: Cuts) -> None:
        self.captured, self.cuts = captured, cuts
        held = captured.constants.items()  # detached: nothing of the model itself is learned
        self._constants = {n: v.detach() if isinstance(v, Tensor) else v for n, v in held}
        self._nodes: dict[str, list[Node]] = {}
        for node, name in captured.parameters.items():
            self._nodes.setdefault(name, []).append(node)
        for layer, sources in zip(captured.layers, captured.sources, strict=True):
            self._nodes |= {name: list(sources) for name in layer.names}  # output channels first
        bounds = self._bounds()
        ends = [*bounds[1:], len(captured.nodes)]
        self.blocks = [self._block(a, b) for a, b in zip(bounds, ends, strict=True)]

    @staticmethod
    def of(runner: Runner) -> Blocks | None:
        """Of a runner's graph; None where it has none."""
        return Blocks(runner.captured, runner.cuts) if isinstance(runner, Executor) else None

    def start(self, batch: Any) -> Live:
        """Before the first block, for inputs ``[N, …]`` or a nest of them."""
        leaves = pytree.tree_leaves(batch)
        return Live(dict(zip(self.captured.inputs, leaves, strict=True)), len(leaves[0]))

    def run(self, block: Block, live: Live, weights: Weights) -> Live:
        """Behind a block, some parameters replaced; derivatives by them are recorded where autograd is on."""
        return self._run(block.first, block.last, live, weights)

    def entering(self, block: Block, layer: Layer, live: Live, weights: Weights) -> tuple[Use, Tensor] | None:
        """How a layer's weight is applied for the first time, and to what, from the values before its block.

        None: its first use is no matrix product or convolution.
        """
        index = self._first_use(layer)
        node = self.captured.nodes[index]
        entered = node.args[0]
        if self.cuts.applied(node) is None or not isinstance(entered, Node):
            return None
        before = self._run(block.first, index, live, weights)
        x: Tensor = self._reader(before.values, live.samples, weights)(entered)
        return Use.of_node(node, layer.shape), x

    def _run(self, first: int, last: int, live: Live, weights: Weights) -> Live:
        values = dict(live.values)
        value = self._reader(values, live.samples, weights)
        for index in range(first, last):
            node = self.captured.nodes[index]
            values[node] = evaluate(node, value)
            for dead in self.cuts.dying[index]:
                values.pop(dead, None)
        return Live(values, live.samples)

    def _reader(self, values: Mapping[Node, Any], samples: int, weights: Weights) -> Callable[[Node], Any]:
        """What gives every argument of a node: a live value, a size, a parameter that is replaced, or a constant."""
        own = {node: tensor for name, tensor in weights.items() for node in self._nodes.get(name, ())}
        known: dict[Node, Any] = {}

        def value(node: Node) -> Any:
            if node in values:
                return values[node]
            if is_size(node):
                return self.cuts.size(node, samples)
            if node in own:
                return own[node]
            if not self.cuts.sources(node).intersection(own):
                return self._constants[node]
            if node not in known:
                known[node] = evaluate(node, value)
            return known[node]

        return value

    def outputs(self, live: Live) -> Any:
        """The model's output, behind the last block."""
        found = [live.values.get(node) if isinstance(node, Node) else node for node in self.captured.outputs]
        return self.captured.unflatten(found)

    def absorbs(self, layer: Layer) -> tuple[str, float] | None:
        """(parameter or buffer, sign) that a shift of a layer's output can be added to, ``[outputs]`` each; None: nothing can.

        Its own bias takes the shift's negative; where it has none, the running mean of a batch norm right behind takes the shift.
        """
        node = self.captured.nodes[self._first_use(layer)]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if isinstance(bias, Node):
            name = self.captured.parameters.get(bias)
            return None if name is None else (name, -1.0)
        users = list(node.users)
        if len(users) == 1 and "batch_norm" in str(users[0].target):
            mean = users[0].args[3]
            name = self.captured.parameters.get(mean) if isinstance(mean, Node) else None
            return None if name is None else (name, 1.0)
        return None

    def _first_use(self, layer: Layer) -> int:
        names = [known.name for known in self.captured.layers]
        return self.cuts.starts[names.index(layer.name)]

    def _bounds(self) -> list[int]:
        """The first node of every block: up to ``MOST_LAYERS`` together, cut where the least of a sample lives."""
        bounds, starts, points = [0], sorted(set(self.cuts.starts)), self._single_points
        while True:
            ahead = [start for start in starts if start >= bounds[-1]]
            if len(ahead) <= MOST_LAYERS + 1:  # no layer alone at the end
                return bounds
            near = {p: size for p, size in points.items() if ahead[0] < p <= ahead[MOST_LAYERS]}
            far = [p for p in points if ahead[MOST_LAYERS] < p <= ahead[min(2 * MOST_LAYERS, len(ahead) - 1)]]
            least = min(near.values(), default=0)
            wanted = max((p for p, size in near.items() if size == least), default=min(far, default=ahead[MOST_LAYERS]))
            bounds.append(wanted)

    @cached_property
    def _single_points(self) -> dict[int, int]:
        """{node before which a single tensor lives, one that counts samples: how many numbers of a sample it has}."""
        alive: set[Node] = set(self.captured.inputs).intersection(self.cuts.last_uses())
        points = {}
        for index, node in enumerate(self.captured.nodes):
            if index and len(alive) == 1:
                meta = next(iter(alive)).meta["val"]
                if isinstance(meta, Tensor) and batch_dim(meta) is not None:
                    points[index] = math.prod(size for size in meta.shape if isinstance(size, int))
            alive.add(node)
            alive -= set(self.cuts.dying[index])
        return points

    def _block(self, first: int, last: int) -> Block:
        starts, nodes = self.cuts.starts, self.captured.nodes[first:last]
        layers = tuple(
            self.captured.layers[k]
            for k in sorted(range(len(starts)), key=starts.__getitem__)
            if first <= starts[k] < last
        )
        weights = {name for layer in self.captured.layers for name in layer.names}
        read = {
            source
            for node in nodes
            for argument in node.all_input_nodes
            if argument in self.captured.constants
            for source in self.cuts.sources(argument)
        }
        constants, known = self.captured.constants, self.captured.parameters
        names = {known[node] for node in read if node in known and isinstance(constants[node], nn.Parameter)}
        return Block(first, last, layers, tuple(sorted(names - weights)))

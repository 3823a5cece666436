"""Where a captured graph can be cut, which values live there, and the segments between the cuts as functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..common import require
from .capture import Captured, is_size
from .weights import KINDS


@dataclass(frozen=True)
class Segment:
    """A run of nodes as one function of live values, constants and sizes."""

    function: Callable[..., tuple[Any, ...]]
    values: tuple[Node, ...]
    constants: tuple[Node, ...]
    sizes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    weights: frozenset[Node]  # layers' weights that the constants are computed from
    applied: tuple[Node, ...]  # nodes that apply a layer's weight to a value


class Cuts:
    """A cut before the first use of each layer's weight and one behind that node: position 2k and 2k + 1 of layer k.

    Attributes:
        layer_of: the layer of each weight.
        depends: for every constant the layers' weights that it is computed from.
        starts: index of the first node that uses each layer's weight.
        bounds: index of the first node of every segment, and the number of nodes.
        live: values that exist before each bound and are needed at or after it.
        dying: for every node the values that nothing reads after it.
        applies: for every node that applies a layer's weight to a value, the first source of that weight.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._sizes: dict[tuple[Node, int], int] = {}
        self._behind: dict[Node, frozenset[Node]] = {}
        self.layer_of = {node: k for k, nodes in enumerate(captured.sources) for node in nodes}
        self.depends = {node: self.sources(node).intersection(self.layer_of) for node in captured.constants}
        self.starts = self._first_uses()
        order = sorted(range(len(self.starts)), key=self.starts.__getitem__)
        require(order == list(range(len(order))), "executor", "layers", "be used in order", "another order")
        self.bounds = [0, *(b for start in self.starts for b in (start, start + 1)), len(captured.nodes)]
        last = self.last_uses()
        self.live = self._liveness(last)
        self.dying = [[n for n, end in last.items() if end == k] for k in range(len(captured.nodes))]
        found = ((node, self.applied(node)) for node in captured.nodes)
        self.applies = {node: captured.sources[layer][0] for node, layer in found if layer is not None}

    @cached_property
    def segments(self) -> list[Segment]:
        """The nodes from each bound to the next."""
        pieces = [self.captured.nodes[a:b] for a, b in itertools.pairwise(self.bounds)]
        return [self._build(piece, self.live[k + 1]) for k, piece in enumerate(pieces)]

    def weights(self, node: Node) -> set[Node]:
        """The layers' weights that a node reads, itself or through constants."""
        return {weight for argument in node.all_input_nodes for weight in self.depends.get(argument, ())}

    def sources(self, node: Node) -> frozenset[Node]:
        """Layers' weights and nodes without inputs that a constant is computed from; itself where it is one."""
        if node not in self._behind:
            inputs = [] if node in self.layer_of else node.all_input_nodes
            self._behind[node] = frozenset().union(*map(self.sources, inputs)) if inputs else frozenset([node])
        return self._behind[node]

    def applied(self, node: Node) -> int | None:
        """The layer whose weight, or some of its output channels, a matrix product or convolution applies; None for others."""
        weight = node.args[1] if node.target in KINDS else None
        behind = self.depends.get(weight, ()) if isinstance(weight, Node) else ()
        layers = {self.layer_of[source] for source in behind}
        return layers.pop() if len(layers) == 1 else None

    def size(self, node: Node, batch: int) -> int:
        """The integer that a node computes from the batch size."""
        key = (node, batch)
        if key not in self._sizes:
            value, symbol = node.meta["val"], self.captured.batch
            known = isinstance(value, torch.SymInt)
            self._sizes[key] = int(value.node.expr.subs(symbol, batch)) if known else value
        return self._sizes[key]

    def _first_uses(self) -> list[int]:
        starts: dict[int, int] = {}
        for index, node in enumerate(self.captured.nodes):
            for weight in self.weights(node):
                starts.setdefault(self.layer_of[weight], index)
        return [starts[k] for k in range(len(self.captured.layers))]

    def _liveness(self, last: dict[Node, int]) -> list[frozenset[Node]]:
        produced = {node: k for k, node in enumerate(self.captured.nodes)} | dict.fromkeys(self.captured.inputs, -1)
        return [frozenset(n for n, made in produced.items() if made < b <= last.get(n, -1)) for b in self.bounds]

    def last_uses(self) -> dict[Node, int]:
        """Index of the last node that reads each value; the outputs are read after the last one."""
        nodes = self.captured.nodes
        live = {*nodes, *self.captured.inputs}
        last = {node: len(nodes) for node in self.captured.outputs if isinstance(node, Node)}
        for index, node in enumerate(nodes):
            for argument in node.all_input_nodes:
                if argument in live:
                    last[argument] = max(last.get(argument, -1), index)
        return last

    def _build(self, nodes: Sequence[Node], live: frozenset[Node]) -> Segment:
        graph, copies = Graph(), {}
        inside = set(nodes)
        outside = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
        sizes = tuple(n for n in outside if is_size(n))
        constants = tuple(n for n in outside if n in self.captured.constants and not is_size(n))
        values = tuple(n for n in outside if n not in self.captured.constants and not is_size(n))
        for node in (*values, *constants, *sizes):
            copies[node] = graph.placeholder(node.name)
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        outputs = tuple(n for n in nodes if n in live)
        graph.output(tuple(copies[n] for n in outputs))
        weights = frozenset().union(*(self.depends[n] for n in constants)) if constants else frozenset()
        applied = tuple(node for node in nodes if node in self.applies)
        return Segment(GraphModule({}, graph).forward, values, constants, sizes, outputs, weights, applied)

"""Which weights a graph applies, and how: those that can be quantized become layers, every other one is named with a reason.

A layer's weight lies in the graph with its output channels first, whatever its parameter has (:meth:`clado.quant.Layer.rows`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..quant import Layer, applied_as, groups_of, has_rows, in_rows, layer_name, positions, storage

aten = torch.ops.aten
LINEAR = aten.linear.default
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
MATMULS = (aten.matmul.default, aten.mm.default)
# Operators that apply a weight, their second argument, to their first one.
KINDS: dict[Any, str] = {
    LINEAR: "linear",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
    aten.matmul.default: "matmul",
    aten.mm.default: "matmul",
}
# What leaves a weight as it is, turns it, or takes some of its output channels.
_SAME = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default)
_TURNED = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
_TAKEN = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.slice.Tensor)
_SHAPED = (aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints)
_VIEWS = (*_SAME, *_TURNED, *_TAKEN, *_SHAPED, operator.getitem, aten.select.int, aten.expand.default)
_CHECKS = (aten._assert_tensor_metadata.default,)  # what torch.export adds


@dataclass(frozen=True)
class Weights:
    """The weights of a graph.

    Attributes:
        layers: in the order of their first use; shapes with output channels first.
        sources: for each layer the nodes of its weight (more than one when tied under several names).
        skipped: {module or parameter that stays float: why}.
    """

    layers: list[Layer] = field(default_factory=list)
    sources: list[tuple[Node, ...]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Use:
    """A parameter as an operator applies it; ``turned``: its transpose is what the operator is given."""

    node: Node
    kind: str
    parameter: Node
    turned: bool
    macs: int

    @property
    def applied(self) -> str:
        """How the parameter itself is applied: the kind of its layer."""
        return applied_as(self.kind, self.turned)


def find_weights(
    model: nn.Module, graph: Graph, live: Sequence[Node], names: Mapping[Node, str], given: Mapping[Node, Tensor]
) -> Weights:
    """Find the layers, and put their weights in rows.

    Args:
        model: whose parameters they are.
        graph: changed in place where a parameter does not have its output channels first.
        live: inputs and what depends on them and reaches the output, in execution order.
        names: the placeholders of parameters and buffers, with their names in the model.
        given: their values.
    """
    finder = _Finder(model, live, names, given)
    uses: dict[Any, list[_Use]] = {}
    for node in live:
        use = finder.use(node)
        if use is not None:
            uses.setdefault(storage(given[use.parameter]), []).append(use)
    found = Weights(skipped=finder.others(uses))
    for key, own in uses.items():
        first = min(own, key=lambda use: not has_rows(use.applied))  # one that has its output channels first, if any
        groups = groups_of(first.node.args, first.node.kwargs)
        macs = sum(use.macs for use in own)
        layer = layer_of(finder.aliases[key], given[first.parameter], first.applied, groups, macs)
        found.layers.append(layer)
        found.sources.append(tuple(_put_in_rows(graph, node, layer) for node in finder.placeholders[key]))
        for use in own:
            if has_rows(use.applied) == layer.in_rows:
                _simplify(use.node, found.sources[-1])
    return found


def layer_of(names: Sequence[str], parameter: Tensor, kind: str, groups: int, macs: int) -> Layer:
    """The layer of a parameter that is applied so."""
    return Layer(layer_name(names[0]), kind, tuple(in_rows(kind, parameter, groups).shape), macs, tuple(names))


class _Finder:
    """What is known of a model's parameters of two or more dimensions, by storage.

    Attributes:
        aliases: their names.
        placeholders: their nodes.
    """

    def __init__(
        self, model: nn.Module, live: Sequence[Node], names: Mapping[Node, str], given: Mapping[Node, Tensor]
    ) -> None:
        self._live, self._names, self._given = set(live), names, given
        self._computed: list[
            tuple[str, list[str]]
        ] = []  # (function, parameters behind it) of weights that are computed
        self.aliases: dict[Any, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() > 1:
                self.aliases.setdefault(storage(parameter), []).append(name)
        self.placeholders: dict[Any, list[Node]] = {}
        for node in names:
            if node in given and storage(given[node]) in self.aliases:
                self.placeholders.setdefault(storage(given[node]), []).append(node)

    def use(self, node: Node) -> _Use | None:
        """How a node applies a parameter to something that depends on the input; None where it does not."""
        kind = KINDS.get(node.target)
        if kind is None or node.args[0] not in self._live:
            return None
        weight = node.args[1]
        if not isinstance(weight, Node) or weight in self._live or (kind == "matmul" and weight.meta["val"].dim() != 2):
            return None
        behind = _behind(weight, self._names)
        if behind is None or storage(self._given[behind[0]]) not in self.aliases:
            self._note(weight)
            return None
        parameter, turned = behind
        return _Use(node, kind, parameter, turned, _macs(node, kind, weight.meta["val"]))

    def _note(self, weight: Node) -> None:
        """Keep what computes a weight."""
        sources = [node for node in upstream([weight]) if node in self._given]
        keys = dict.fromkeys(storage(self._given[node]) for node in sources)
        behind = [self.aliases[key][0] for key in keys if key in self.aliases]
        if behind:
            self._computed.append((_name(weight), behind))

    def others(self, searched: Container[Any]) -> dict[str, str]:
        """Every parameter of two or more dimensions that no layer has, with the reason."""
        left = {names[0]: key for key, names in self.aliases.items() if key not in searched}
        return unsearched(
            [self.aliases[key] for key in left.values()], self._computed, lambda names: self._readers(left[names[0]])
        )

    def _readers(self, key: Any) -> set[str]:
        """Names of what reads a parameter, where the output depends on it."""
        own = self.placeholders.get(key, [])
        if not any(node in self._live for node in _behind_all(own, lambda node: True)):
            return set()
        readers = _behind_all(own, lambda node: node.target in _VIEWS)
        return {_name(node) for node in readers if node.target not in (*_VIEWS, *_CHECKS)}


def _behind_all(nodes: Sequence[Node], follow: Callable[[Node], bool]) -> list[Node]:
    """The nodes that read others, and those that read them in turn where ``follow`` says so."""
    seen, stack = dict[Node, None](), [user for node in nodes for user in node.users]
    while stack:
        node = stack.pop()
        if node not in seen and node.op == "call_function":
            seen[node] = None
            stack += node.users if follow(node) else ()
    return list(seen)


def unsearched(
    parameters: Iterable[Sequence[str]],
    computed: Sequence[tuple[str, Iterable[str]]],
    readers: Callable[[Sequence[str]], Iterable[str]],
) -> dict[str, str]:
    """{module or parameter that stays float: why}.

    Args:
        parameters: those that no layer has, each under all of its names.
        computed: (function, parameters) of weights that a function computes from parameters; the module is named.
        readers: what reads a parameter otherwise; nothing: the output does not depend on it.
    """
    skipped, inside = dict[str, str](), set[str]()
    for function, behind in computed:
        inside.update(behind)
        skipped[_module_of(sorted(behind))] = (
            f"its weight is computed ({function}): fold it into a parameter to search it"
        )
    for names in parameters:
        if not inside.intersection(names):
            read = ", ".join(sorted(readers(names)))
            reason = f"read by {read}, which is not searched" if read else "the output does not depend on it"
            skipped[layer_name(names[0])] = reason
    return skipped


def _behind(weight: Node, names: Mapping[Node, str]) -> tuple[Node, bool] | None:
    """The parameter that a weight is, or output channels of it, and whether turned around; None for what is computed."""
    turned = taken = False
    while weight not in names:
        source: Any = weight.args[0] if weight.args else None
        if weight.op != "call_function" or not isinstance(source, Node):
            return None
        if weight.target in _TURNED and weight.meta["val"].dim() == 2:
            turned = not turned
        elif weight.target in _TAKEN and _dimension(weight) == 0:
            taken = True
        elif weight.target not in (*_SAME, operator.getitem) and not _keeps_rows(weight, source):
            return None
        weight = source
    return None if turned and taken else (weight, turned)


def _dimension(node: Node) -> Any:
    """Along which dimension a node takes a part."""
    at = 1 if node.target == aten.slice.Tensor else 2
    return node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)


def _keeps_rows(node: Node, source: Node) -> bool:
    shapes = [part.meta["val"].shape for part in (node, source)]
    return node.target in _SHAPED and shapes[0][0] == shapes[1][0] and math.prod(shapes[0]) == math.prod(shapes[1])


def upstream(nodes: Iterable[Node]) -> dict[Node, None]:
    """These nodes and all that they are computed from."""
    seen, stack = dict[Node, None](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack += node.all_input_nodes
    return seen


def _module_of(parameters: Sequence[str]) -> str:
    """The module that holds all these parameters; the first one where that is the whole model."""
    paths = [
        n.split(".parametrizations.")[0] if ".parametrizations." in n else n.rpartition(".")[0] for n in parameters
    ]
    parts = zip(*(path.split(".") for path in paths), strict=False)
    same = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, parts)]
    return ".".join(same) or layer_name(parameters[0])


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _macs(node: Node, kind: str, weight: Tensor) -> int:
    """Multiply-adds per sample: how often a weight is applied, times its elements."""
    entered, left = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return math.prod(map(_per_sample, positions(kind, entered, left))) * weight.numel()


def _per_sample(size: Any) -> int:
    """A size for a batch of one."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: 1 for symbol in expression.free_symbols}))


def _put_in_rows(graph: Graph, parameter: Node, layer: Layer) -> Node:
    """The node that holds a layer's weight with its output channels first; every reader of the parameter reads it from there."""
    if layer.in_rows:
        return parameter
    users, value = list(parameter.users), parameter.meta["val"]
    with graph.inserting_after(parameter):
        rows = graph.call_function(layer.rows, (parameter,))
    with graph.inserting_after(rows):
        back = graph.call_function(layer.parameter, (rows, tuple(value.shape)))
    rows.meta["val"] = layer.rows(value)
    back.meta["val"] = value
    for user in users:
        user.replace_input_with(parameter, back)
    return rows


def _simplify(node: Node, sources: Sequence[Node]) -> None:
    """A product with a whole weight is a linear layer."""
    weight: Any = node.args[1]
    while weight not in sources and weight.target in (*_TURNED, *_SAME):
        weight = weight.args[0]
    if weight not in sources and weight.args and weight.args[0] in sources:
        weight = weight.args[0]  # rows, of which it is the parameter
    if weight in sources and node.target in (*MATMULS, LINEAR):
        bias = node.args[2:3] if node.target == LINEAR else ()
        node.target, node.args = LINEAR, (node.args[0], weight, *bias)

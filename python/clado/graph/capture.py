"""A trained module becomes a graph whose layers are known: torch.export with a dynamic batch, then a list of cuts."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..common import CladoError, require
from ..quant import Layer, ignored, layer_name, storage
from .forward import ForwardStep, Step, check_eval
from .narrow import narrow

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
KINDS: dict[Any, str] = {aten.linear.default: "linear", **dict.fromkeys(CONVOLUTIONS, "conv2d")}


@dataclass(frozen=True)
class Captured:
    """The functional graph of a model, ready to be cut.

    Attributes:
        graph: fx graph in execution order, without mutation.
        nodes: what depends on the input and reaches the output, in execution order.
        constants: parameters, buffers, lifted tensors and everything computed from them alone, by node.
        layers: quantizable layers in execution order.
        sources: for each layer the placeholders of its weight (more than one when tied under several names).
        batch: the symbol that stands for the batch size.
        inputs: a placeholder per tensor of the batch, in pytree order.
        outputs: a node per tensor of the output, in pytree order; other leaves as they are.
        unflatten: builds the model's output from such leaves.
        parameters: the name in the model of every placeholder of a parameter or buffer.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    constants: dict[Node, Any]
    layers: tuple[Layer, ...]
    sources: tuple[tuple[Node, ...], ...]
    batch: Any
    inputs: tuple[Node, ...]
    outputs: tuple[Any, ...]
    unflatten: Callable[[Sequence[Any]], Any]
    skipped: dict[str, str] = field(default_factory=dict)
    parameters: dict[Node, str] = field(default_factory=dict)


class NotCapturable(CladoError):
    """The model cannot be run as a graph; whole forwards may still do."""


def _needs(condition: bool, argument: str, must: str, got: object) -> None:
    if not condition:
        raise NotCapturable(f"capture: {argument} must {must}, got {got}")


def capture(
    model: nn.Module,
    example: Any,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
    forward_step: ForwardStep | None = None,
) -> Captured:
    """Export ``model`` with a dynamic batch dimension and find its quantizable layers.

    Args:
        model: module in eval mode that maps a batch to a tensor, or a nest of tensors, of N rows each.
        example: a batch of real inputs with N ≥ 2: a tensor ``[N, …]``, or a nest of them for ``forward_step``.
        ignore: layers to keep in float: fnmatch patterns, or regular expressions after ``re:``.
        quantize_ends: also quantize a first convolution and the classifier, which the paper keeps in float.
        forward_step: what runs the model on a batch; None: ``model(batch)``.

    Raises:
        NotCapturable: not exportable, changing its own buffers, of a fixed batch size, or with outputs that are not ``[N, …]``.
        CladoError: model in train mode or without layers; an ``ignore`` pattern that matches nothing.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example)]
    require(all(s and s[0] >= 2 for s in shapes), "capture", "example", "hold at least two samples", shapes)
    check_eval(model)

    program = _export(model if forward_step is None else Step(model, forward_step).eval(), example)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.graph_signature
    _needs(
        not signature.buffers_to_mutate,
        "model",
        "leave its buffers unchanged in eval mode",
        f"changes of {sorted(signature.buffers_to_mutate.values())[:3]}",
    )
    outputs = tuple(next(node for node in program.graph.nodes if node.op == "output").args[0])
    entries = [placeholders[name] for name in signature.user_inputs]
    nodes = _live_nodes(program.graph, entries, outputs)
    positions = {node: _positions(node) for node in nodes if node.target in KINDS}  # of the whole forward
    narrow(program.graph, nodes, outputs)
    nodes = _live_nodes(program.graph, entries, outputs)
    used = {argument for node in nodes for argument in node.all_input_nodes} | set(outputs)
    inputs = tuple(entries)
    batch = next(node for node in inputs if node in used).meta["val"].shape[0]
    _needs(isinstance(batch, torch.SymInt), "model", "accept any batch size", f"the fixed batch size {batch}")
    live = {*nodes, *inputs}
    for node in outputs:
        value = node.meta["val"] if isinstance(node, Node) and node in live else None
        rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        _needs(value is None or rows, "model", "return tensors [N, …]", f"{value}")
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    constants = _constants(
        program.graph, nodes, inputs, outputs, {placeholders[key]: tensors[name] for key, name in names.items()}
    )
    layers, sources, skipped = _find_layers(model, positions, constants, {placeholders[k]: v for k, v in names.items()})
    keep = ignored(layers, ignore, quantize_ends)
    kept = [k for k, layer in enumerate(layers) if layer.name not in keep]
    require(len(kept) > 0, "capture", "model", "have at least one Linear or Conv2d layer to quantize", "none")
    return Captured(
        graph=program.graph,
        nodes=nodes,
        constants=constants,
        layers=tuple(layers[k] for k in kept),
        sources=tuple(sources[k] for k in kept),
        batch=batch.node.expr,
        inputs=inputs,
        outputs=outputs,
        unflatten=lambda leaves: pytree.tree_unflatten(list(leaves), program.call_spec.out_spec),
        skipped={**skipped, **keep},
        parameters=_named(model, constants, [placeholders[key] for key in names]),
    )


def _export(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            shapes = (pytree.tree_map(lambda leaf: {0: batch}, example),)
            program: torch.export.ExportedProgram = torch.export.export(model, (example,), dynamic_shapes=shapes)
            program = program.run_decompositions({})  # decomposes nothing, but removes mutation
    except Exception as error:  # torch.export raises whatever the model's code raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NotCapturable(
            f"capture: model must be exportable by torch.export with a dynamic batch, got {type(error).__name__}: {reason}"
        ) from error
    # Another batch, dtype or device may lay values out so that none but a copy has the shape.
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the graph that torch prints, and the warning it logs, before an error that says it all."""
    logger, said = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    logger.addFilter(_not_about_user_code)
    try:
        with redirect_stderr(said):
            yield
        sys.stderr.write(said.getvalue())  # of a model that was exported
    finally:
        logger.removeFilter(_not_about_user_code)


def _not_about_user_code(record: logging.LogRecord) -> bool:
    return "find user code" not in record.getMessage()


def is_size(node: Node) -> bool:
    """Whether a node is an integer computed from the batch size."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _live_nodes(graph: Graph, sources: Sequence[Node], outputs: Sequence[Any]) -> tuple[Node, ...]:
    """Nodes between inputs and outputs; assertions and dead ends fall away."""
    needed: set[Node] = set()
    stack = [node for node in outputs if isinstance(node, Node)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    depends = set(sources)
    for node in graph.nodes:
        if depends.intersection(node.all_input_nodes):
            depends.add(node)
    require(
        any(node in depends for node in outputs),
        "capture",
        "model",
        "return something that depends on its input",
        "a constant",
    )
    return tuple(n for n in graph.nodes if n in needed and n in depends and n.op == "call_function" and not is_size(n))


def _constants(
    graph: Graph, nodes: Sequence[Node], sources: Sequence[Node], outputs: Sequence[Any], given: dict[Node, Tensor]
) -> dict[Node, Any]:
    """Values of everything the live nodes and outputs need that does not depend on the inputs, computed once."""
    values: dict[Node, Any] = dict(given)
    live = {*nodes, *sources}
    needed = [argument for node in nodes for argument in node.all_input_nodes]
    needed += [node for node in outputs if isinstance(node, Node)]

    def value(node: Node) -> Any:
        if node not in values:
            values[node] = evaluate(node, value)
        return values[node]

    with torch.no_grad():
        for node in needed:
            if node not in live and not is_size(node):
                value(node)
    return values


def evaluate(node: Node, value: Any) -> Any:
    """Run one call node, its node arguments replaced by ``value(argument)``."""
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), value)
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _find_layers(
    model: nn.Module, positions: dict[Node, int], constants: dict[Node, Any], names: dict[Node, str]
) -> tuple[list[Layer], list[tuple[Node, ...]], dict[str, str]]:
    aliases: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(storage(parameter), []).append(name)
    weights: dict[tuple[Any, ...], list[Node]] = {}
    for placeholder in names:
        weights.setdefault(storage(constants[placeholder]) if placeholder in constants else (placeholder,), []).append(
            placeholder
        )

    macs: dict[tuple[Any, ...], int] = {}
    kinds: dict[tuple[Any, ...], str] = {}
    skipped: dict[str, str] = {}
    for node, count in positions.items():
        kind = KINDS[node.target]
        weight = node.args[1]
        if not isinstance(weight, Node) or weight not in names or storage(constants[weight]) not in aliases:
            skipped[str(node)] = "its weight is computed, not a parameter"
            continue
        key = storage(constants[weight])
        kinds.setdefault(key, kind)
        macs[key] = macs.get(key, 0) + count * math.prod(constants[weight].shape)
    layers, sources = [], []
    for key, kind in kinds.items():
        parameters = aliases[key]
        layers.append(
            Layer(
                layer_name(parameters[0]), kind, tuple(constants[weights[key][0]].shape), macs[key], tuple(parameters)
            )
        )
        sources.append(tuple(weights[key]))
    return layers, sources, skipped


def _named(model: nn.Module, constants: dict[Node, Any], placeholders: Sequence[Node]) -> dict[Node, str]:
    """The first name in the model of what each placeholder stands for; tensors of the graph's own are left out."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in own:
        first.setdefault(storage(tensor), name)
    known = [node for node in placeholders if node in constants and storage(constants[node]) in first]
    return {node: first[storage(constants[node])] for node in known}


def _positions(node: Node) -> int:
    """How often the weight is applied per sample: output elements over output channels."""
    shape = node.meta["val"].shape
    channel = 1 if KINDS[node.target] == "conv2d" else len(shape) - 1
    return math.prod(size for d, size in enumerate(shape) if d != channel and not isinstance(size, torch.SymInt))

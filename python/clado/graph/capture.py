"""A trained module becomes a graph whose layers are known: torch.export with a dynamic batch, then a list of cuts."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..common import CladoError, require
from ..quant import InputRounding, Layer, ignored, storage
from .batch_first import put_batch_first
from .forward import ForwardStep, Step, check_eval
from .narrow import narrow
from .weights import find_weights, upstream

aten = torch.ops.aten


@dataclass(frozen=True)
class Captured:
    """The functional graph of a model, ready to be cut.

    Attributes:
        graph: fx graph in execution order, without mutation.
        nodes: what depends on the input and reaches the output, in execution order.
        constants: parameters, buffers, lifted tensors and everything computed from them alone, by node.
        layers: quantizable layers in execution order.
        sources: for each layer the constants that are its weight, output channels first (more than one when tied under
            several names).
        batch: the symbol that stands for the batch size.
        inputs: a placeholder per tensor of the batch, in pytree order.
        outputs: a node per tensor of the output, in pytree order; other leaves as they are.
        unflatten: builds the model's output from such leaves.
        parameters: the name in the model of every placeholder of a parameter or buffer.
        rounds: how the clean run rounds what layers' weights are applied to, by the first of a layer's sources.
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
    rounds: dict[Node, InputRounding] = field(default_factory=dict)


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
    only: Sequence[str] | None = None,
) -> Captured:
    """Export ``model`` with a dynamic batch dimension and find its quantizable layers.

    Args:
        model: module in eval mode that maps a batch to a tensor, or a nest of tensors, of N rows each.
        example: a batch of real inputs with N ≥ 2: a tensor ``[N, …]``, or a nest of them for ``forward_step``.
        ignore: layers to keep in float: fnmatch patterns, or regular expressions after ``re:``.
        quantize_ends: also quantize a first convolution and the classifier, which the paper keeps in float.
        forward_step: what runs the model on a batch; None: ``model(batch)``.
        only: names of the layers to take, whatever ``ignore`` and ``quantize_ends`` say; None: all others.

    Raises:
        NotCapturable: not exportable, changing its own buffers, of a fixed batch size, or with outputs that are not ``[N, …]``.
        CladoError: model in train mode or without layers; an ``ignore`` pattern that matches nothing.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example)]
    require(all(s and s[0] >= 2 for s in shapes), "capture", "example", "hold at least two samples", shapes)
    check_eval(model)

    program = _export(model if forward_step is None else Step(model, forward_step).eval(), example)
    signature, graph = program.graph_signature, program.graph
    changed = sorted(signature.buffers_to_mutate.values())[:3]
    _needs(not changed, "model", "leave its buffers unchanged in eval mode", f"changes of {changed}")
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    outputs = tuple(next(node for node in graph.nodes if node.op == "output").args[0])
    inputs = tuple(placeholders[name] for name in signature.user_inputs)
    batch = _batch(inputs, _live_nodes(graph, inputs, outputs), outputs)
    put_batch_first(graph, batch)
    names = {
        placeholders[key]: name
        for known in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        )
        for key, name in known.items()
    }
    tensors = {**program.state_dict, **program.constants}
    given = {node: tensors[name] for node, name in names.items()}
    nodes = _live_nodes(graph, inputs, outputs)
    found = find_weights(model, graph, [*inputs, *nodes], names, given)  # their work is that of the whole forward
    narrow(graph, nodes, outputs)
    nodes = _live_nodes(graph, inputs, outputs)
    sources = [node for own in found.sources for node in own]
    constants = _constants(nodes, inputs, outputs, sources, given)
    keep = ignored(found.layers, ignore, quantize_ends, only) if found.layers else {}
    kept = [k for k, layer in enumerate(found.layers) if layer.name not in keep]
    require(len(kept) > 0, "capture", "model", "have at least one layer to quantize", _none(found.skipped))
    return Captured(
        graph=graph,
        nodes=nodes,
        constants=constants,
        layers=tuple(found.layers[k] for k in kept),
        sources=tuple(found.sources[k] for k in kept),
        batch=batch.node.expr,
        inputs=inputs,
        outputs=outputs,
        unflatten=lambda leaves: pytree.tree_unflatten(list(leaves), program.call_spec.out_spec),
        skipped={**found.skipped, **keep},
        parameters=_named(model, constants, list(names)),
    )


def _batch(inputs: Sequence[Node], nodes: Sequence[Node], outputs: Sequence[Any]) -> torch.SymInt:
    """The symbol of the batch size, which every output counts first."""
    used = {argument for node in nodes for argument in node.all_input_nodes} | set(outputs)
    size: Any = next(node for node in inputs if node in used).meta["val"].shape[0]
    _needs(isinstance(size, torch.SymInt), "model", "accept any batch size", f"the fixed batch size {size}")
    live = {*nodes, *inputs}
    for node in outputs:
        value = node.meta["val"] if isinstance(node, Node) and node in live else None
        rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        _needs(value is None or rows, "model", "return tensors [N, …]", f"{value}")
    found: torch.SymInt = size
    return found


def _none(skipped: Mapping[str, str]) -> str:
    return "; ".join(["none", *(f"{name}: {why}" for name, why in list(skipped.items())[:3])])


def _export(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            shapes = (pytree.tree_map(lambda leaf: {0: batch}, example),)
            program: torch.export.ExportedProgram = torch.export.export(model, (example,), dynamic_shapes=shapes)
            program = program.run_decompositions({})  # decomposes nothing, but removes mutation
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise NotCapturable(
            "capture: model must be exportable by torch.export with a dynamic batch, got "
            f"{type(error).__name__}: {_reason(error)}"
        ) from error
    # Another batch, dtype or device may lay values out so that none but a copy has the shape.
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return program


def _reason(error: BaseException) -> str:
    """The first line of torch's message; of constraints that are violated the first one."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")] or [""]
    if lines[0].startswith("Constraints violated") and len(lines) > 1:
        return lines[1].split(". ")[0]  # what follows is advice on torch's own arguments
    return lines[0]


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
    needed = upstream(node for node in outputs if isinstance(node, Node))
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
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    outputs: Sequence[Any],
    weights: Sequence[Node],
    given: dict[Node, Tensor],
) -> dict[Node, Any]:
    """Values of weights, and of everything the live nodes and outputs need that does not depend on the inputs, computed once."""
    values: dict[Node, Any] = dict(given)
    live = {*nodes, *inputs}
    needed = [*weights, *(argument for node in nodes for argument in node.all_input_nodes)]
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


def _named(model: nn.Module, constants: dict[Node, Any], placeholders: Sequence[Node]) -> dict[Node, str]:
    """The first name in the model of what each placeholder stands for; tensors of the graph's own are left out."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in own:
        first.setdefault(storage(tensor), name)
    known = [node for node in placeholders if node in constants and storage(constants[node]) in first]
    return {node: first[storage(constants[node])] for node in known}

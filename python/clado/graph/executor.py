"""Runs a captured graph from cut to cut, many perturbations at once.

A cut lies before the first use of each layer's weight. A :class:`State` is the set of live values at a position; its batch
dimension holds one or more streams of the same samples, each stream under its own perturbation. ``fork`` multiplies the
streams by the variants of one weight, ``advance`` carries all of them on under the clean weights, so a prefix that streams
share is computed once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..common import require
from ..quant import Layer
from .capture import Captured, NotCapturable, evaluate, is_size

Overrides = dict[Node, Tensor]
Objective = Callable[[Any], Tensor]
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
# Elements of the per-sample weight gradients that exist at once: beyond it they leave the caches of a CPU.
_OUTER_ELEMENTS = 8 << 20


@dataclass(frozen=True)
class State:
    """Live values at a position.

    Attributes:
        position: 2k before layer k's node, 2k + 1 behind it (:meth:`Executor.fork` steps over it), 2L at the end, -1 before
            the first node. Segment ``position + 1`` leads to the next position.
        values: tensor (or tuple of tensors) per live node, streams stacked along the batch dimension, last fork outermost.
        samples: samples per stream.
        overrides: per stream, the perturbed weights it runs under.
    """

    position: int
    values: dict[Node, Any]
    samples: int
    overrides: tuple[Overrides, ...]

    @property
    def streams(self) -> int:
        return len(self.overrides)


@dataclass(frozen=True)
class _Segment:
    """A run of nodes as one function of live values, constants and sizes."""

    function: Callable[..., tuple[Any, ...]]
    values: tuple[Node, ...]
    constants: tuple[Node, ...]
    sizes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    weights: frozenset[Node]  # placeholders of layers' weights that the constants are computed from


@dataclass(frozen=True)
class _Tap:
    """A node that uses a layer's weight, as it ran: what entered and what left it."""

    layer: int
    node: Node
    inputs: dict[Node, Any]
    output: Tensor


class Runner(Protocol):
    """What estimators ask of an executor: of a graph, of carried differences, or of whole forwards. States are opaque."""

    work: float

    @property
    def num_layers(self) -> int: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def skipped(self) -> dict[str, str]: ...
    @property
    def suffix_share(self) -> list[float]: ...
    @property
    def forward_share(self) -> float: ...
    def slope_share(self, width: int) -> list[float]: ...
    def start(self, batch: Any) -> Any: ...
    def advance(self, state: Any, layer: int) -> Any: ...
    def fork(self, state: Any, layer: int, variants: Sequence[Tensor]) -> Any: ...
    def outputs(self, state: Any) -> list[Any]: ...
    def finish(self, state: Any) -> Tensor: ...
    def clean(self, state: Any) -> Tensor: ...
    def changes(self, finished: Tensor, logits: Tensor) -> Tensor: ...
    def products(self, state: Any, variants: Sequence[Sequence[Tensor]], objective: Objective) -> Tensor: ...


class Executor:
    """Shared-prefix execution of a captured graph.

    Attributes:
        work: multiply-add work done so far in forward-equivalents times samples, counted over the nodes that really ran.
        stack: how many variants of a layer estimators fork into at once; None: all.
    """

    stack: int | None = None

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.work = 0.0
        self._sizes: dict[tuple[Node, int], int] = {}
        self._weights = {node: k for k, nodes in enumerate(captured.sources) for node in nodes}
        self._depends = {node: self._weights_behind(node) for node in captured.constants}
        starts = self._first_uses()
        order = sorted(range(len(starts)), key=starts.__getitem__)
        require(order == list(range(len(starts))), "executor", "layers", "be used in order", "another order")
        self._bounds = bounds = [0, *(b for start in starts for b in (start, start + 1)), len(captured.nodes)]
        pieces = [captured.nodes[a:b] for a, b in itertools.pairwise(bounds)]
        self._live = self._liveness(bounds)
        self._segments = [self._build(piece, self._live[k + 1]) for k, piece in enumerate(pieces)]
        self._flops = [0.0] * len(self._segments)
        self._forward_flops = 0.0  # of the model's own forward, the unit of work
        self._starts = starts
        self._product_flops: dict[int, float] = {}
        last = self._last_uses()
        self._dying = [[n for n, end in last.items() if end == k] for k in range(len(captured.nodes))]

    @property
    def num_layers(self) -> int:
        return len(self.captured.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.captured.layers

    @property
    def skipped(self) -> dict[str, str]:
        return self.captured.skipped

    @property
    def forward_share(self) -> float:
        """What a clean pass takes of the model's own forward: less than 1 where positions are read by nobody."""
        return sum(self._flops) / self._forward_flops

    @property
    def suffix_share(self) -> list[float]:
        """For each layer, the share of a forward's multiply-adds from its node to the end; needs :meth:`self_test`."""
        return [sum(self._flops[2 * k + 1 :]) / self._forward_flops for k in range(self.num_layers)]

    def slope_share(self, width: int) -> list[float]:
        """For each layer, what derivatives by the weights of it and later ones take beyond a product each (:meth:`products`)."""
        extra = []
        for k, start in enumerate(self._starts):
            shape = getattr(self.captured.nodes[start].meta["val"], "shape", ())
            sizes = [size for size in shape if not isinstance(size, torch.SymInt)]
            positions = math.prod(sizes) / self.captured.layers[k].shape[0]
            factor = 1 + width / positions if _outer_pays(positions, width) else width
            extra.append(self._flops[2 * k + 1] * (factor - 1) / self._forward_flops)
        return [sum(extra[k:]) for k in range(len(extra))]

    def start(self, batch: Any) -> State:
        """State before the first node for inputs ``[N, …]``, or a nest of them."""
        leaves = pytree.tree_leaves(batch)
        return State(-1, dict(zip(self.captured.inputs, leaves, strict=True)), len(leaves[0]), ({},))

    def advance(self, state: State, layer: int) -> State:
        """Carry every stream, under its own weights, to the cut before ``layer`` (or the end for ``layer == num_layers``)."""
        for position in range(state.position, 2 * layer):
            state = self._step(state, position)
        return state

    def fork(self, state: State, layer: int, variants: Sequence[Tensor]) -> State:
        """Step over ``layer``'s node with each weight of ``variants``: S streams become len(variants)·S, variant-major."""
        self._check_at(state, layer)
        after = self._live[2 * layer + 2]
        changed = [dict.fromkeys(self.captured.sources[layer], weight) for weight in variants]
        parts = [self._run(2 * layer + 1, state, weights) for weights in changed]
        values = {n: self._stack([state.values[n]] * len(variants), n) for n in state.values if n in after}
        values |= {n: self._stack([part[n] for part in parts], n) for n in parts[0]}
        overrides = tuple({**old, **weights} for weights in changed for old in state.overrides)
        return State(2 * layer + 1, values, state.samples, overrides)

    def rebase(self, weights: Overrides) -> None:
        """Take ``weights`` as the clean ones from now on."""
        constants = {node: self._constant(node, weights) for node in self.captured.constants}
        self.captured = replace(self.captured, constants=constants)

    def outputs(self, state: State) -> list[Any]:
        """The model's output under every stream."""
        end = self.advance(state, self.num_layers)

        def leaf(node: Any, stream: int) -> Any:
            if node in end.values:
                return self._stream(end, node, stream)
            return self.captured.constants[node] if isinstance(node, Node) else node

        unflatten = self.captured.unflatten
        return [unflatten([leaf(n, s) for n in self.captured.outputs]) for s in range(end.streams)]

    def finish(self, state: State) -> Tensor:
        """Outputs ``[S, N, …]`` of every stream, of a model that returns one tensor."""
        end = self.advance(state, self.num_layers)
        output = end.values[self.captured.outputs[0]]
        return output.reshape(end.streams, end.samples, *output.shape[1:])

    def clean(self, state: State) -> Tensor:
        """Clean outputs ``[N, …]`` from a state without perturbations."""
        return self.finish(state)[0]

    def changes(self, finished: Tensor, logits: Tensor) -> Tensor:
        """Logit changes δ ``[S, N, C]`` from what :meth:`finish` gave; it is overwritten."""
        return finished.sub_(logits)

    def products(self, state: State, variants: Sequence[Sequence[Tensor]], objective: Objective) -> Tensor:
        """Directional derivatives ⟨∂ objective / ∂w_j, Δ_j,n⟩ of every stream and sample, for the layers not yet run.

        One forward to the end, one backward down to the output of the next layer. The derivative by a weight is never summed
        over samples: per sample it is the outer product of what enters and of the gradient of what leaves the layer.

        Args:
            state: at a layer's cut.
            variants: all layers' quantized weights.
            objective: scalar from the outputs ``[S·N, …]`` (values of :attr:`Captured.outputs`) whose terms belong to one
                stream and sample each.

        Returns:
            ``[layers not yet run, bits, S, N]``.
        """
        first = state.position // 2
        require(
            state.position == 2 * first, "products", "state", "stand at a layer's cut", f"position {state.position}"
        )
        rows = state.streams * state.samples
        out = torch.zeros(
            self.num_layers - first, len(variants[0]), rows, dtype=torch.float64, device=variants[0][0].device
        )
        counter = FlopCounterMode(display=False) if first not in self._product_flops else contextlib.nullcontext()
        with counter:
            values, taps = self._record(state, first)
            with torch.enable_grad():
                total = objective(State(2 * self.num_layers, values, state.samples, state.overrides))
            found = torch.autograd.grad(total, [tap.output for tap in taps], allow_unused=True)
            for tap, gradient in zip(taps, found, strict=True):
                if gradient is not None:
                    product = self._product(tap, gradient, variants[tap.layer], rows)
                    out[tap.layer - first] += product.T.double()
        if isinstance(counter, FlopCounterMode):
            self._product_flops[first] = counter.get_total_flops() / rows
        self.work += self._product_flops[first] / self._forward_flops * rows
        return out.view(*out.shape[:2], state.streams, state.samples)

    def _record(self, state: State, first: int) -> tuple[dict[Node, Any], list[_Tap]]:
        """Run to the end with autograd on from the first use of a weight of ``first`` or a later layer."""
        values, taps = dict(state.values), []
        with torch.enable_grad():
            for index in range(self._starts[first], len(self.captured.nodes)):
                node = self.captured.nodes[index]
                values[node] = output = self._node(node, values, state)
                used = {self._weights[w] for a in node.all_input_nodes for w in self._depends.get(a, ())}
                for layer in sorted(used):
                    if layer >= first:
                        if not output.requires_grad:
                            output.requires_grad_()
                        inputs = {a: values[a].detach() for a in node.all_input_nodes if a in values}
                        taps.append(_Tap(layer, node, inputs, output))
                for dead in self._dying[index]:
                    values.pop(dead, None)
        return values, taps

    def _node(self, node: Node, values: dict[Node, Any], state: State) -> Any:
        """One node for all streams, each under its own weights."""
        used = {w for a in node.all_input_nodes for w in self._depends.get(a, ())}
        if not any(used.intersection(o) for o in state.overrides):
            return self._evaluate(node, values, {}, state.samples * state.streams)
        meta = {a: a.meta["val"] for a in node.all_input_nodes if a in values}
        parts = [
            self._evaluate(
                node, {a: _slice(values[a], m, s, state.streams) for a, m in meta.items()}, own, state.samples
            )
            for s, own in enumerate(state.overrides)
        ]
        return self._stack(parts, node)

    def _evaluate(self, node: Node, values: dict[Node, Any], weights: Overrides, batch: int) -> Any:
        def value(argument: Node) -> Any:
            if argument in values:
                return values[argument]
            return self._size(argument, batch) if is_size(argument) else self._constant(argument, weights)

        return evaluate(node, value)

    def _product(self, tap: _Tap, gradient: Tensor, variants: Sequence[Tensor], rows: int) -> Tensor:
        """⟨gradient, change of the node's output under each variant⟩ per row, ``[rows, bits]``."""
        node, sources = tap.node, self.captured.sources[tap.layer]
        clean = self.captured.constants[sources[0]]
        parameters = node.args[1] if len(node.args) > 1 else None
        entry = node.args[0]
        if (
            parameters in sources and isinstance(entry, Node) and entry in tap.inputs
        ):  # else the weight is used in other ways
            if node.target == torch.ops.aten.linear.default:
                x, g = (_rows(t, entry.meta["val"], rows) for t in (tap.inputs[entry], gradient))
                if not _outer_pays(x.shape[1], len(variants)):
                    return torch.stack([((g @ (v - clean)) * x).flatten(1).sum(1) for v in variants], 1)
                return _outer_products(x, g, clean, variants)
            elif node.target in _CONVOLUTIONS and gradient.dim() == 4:
                x, g = _patches(node, tap.inputs[entry], gradient, clean.shape)
                if _outer_pays(x.shape[2], len(variants)):
                    groups = x.shape[1]
                    split = [v.reshape(groups, -1, v[0].numel()) for v in (clean, *variants)]
                    parts = [
                        _outer_products(x[:, k], g[:, k], split[0][k], [v[k] for v in split[1:]]) for k in range(groups)
                    ]
                    return torch.stack(parts).sum(0)
        before = self._evaluate(node, tap.inputs, {}, rows)
        out = []
        for variant in variants:
            change = self._evaluate(node, tap.inputs, dict.fromkeys(sources, variant), rows) - before
            out.append(_rows(change * gradient, node.meta["val"], rows).flatten(1).sum(1))
        return torch.stack(out, 1)

    def self_test(self, batch: Any, whole: Callable[[Any], Any] | None = None, rtol: float = 1e-3) -> Any:
        """Check on real data that stacked streams do not mix, at every cut; also counts the work of every segment.

        At each cut the live values of two different batches are stacked and carried over one segment; both must give what
        they give alone, so by induction every suffix is right. Returns the model's clean output.

        Args:
            batch: inputs of two samples.
            whole: the model's own forward, which the graph must agree with and whose multiply-adds are the unit of
                :attr:`work`; None: the graph's own.

        Raises:
            NotCapturable: a cut where stacking changes the values, named by the layer behind it; other outputs than the model's.
        """
        with FlopCounterMode(display=False) as counter:
            expected = None if whole is None else whole(batch)
        self._forward_flops = counter.get_total_flops() / len(pytree.tree_leaves(batch)[0])
        other = pytree.tree_map(lambda x: x * 0.5 if x.is_floating_point() else x[:1].expand_as(x), batch)
        states = [self.start(batch), self.start(other)]
        for position in range(-1, 2 * self.num_layers):
            values = {n: self._stack([s.values[n] for s in states], n) for n in states[0].values}
            stacked = self._step(State(position, values, states[0].samples, ({}, {})), position)
            with FlopCounterMode(display=False) as counter:
                states[0] = self._step(states[0], position)
            self._flops[position + 1] = counter.get_total_flops() / states[0].samples
            states[1] = self._step(states[1], position)
            for node, value in stacked.values.items():
                if not _close(value, self._stack([s.values[node] for s in states], node), rtol):
                    layer = self.captured.layers[min(max(position, 0) // 2, self.num_layers - 1)].name
                    raise NotCapturable(
                        f"capture: model must treat samples independently, got {node} near layer {layer} "
                        "that changes when batches are stacked (batch statistics, dropout or a mixed batch dimension?)"
                    )
        require(sum(self._flops) > 0, "capture", "model", "do matrix products", "none counted")
        self._forward_flops = self._forward_flops or sum(self._flops)
        output = self.outputs(states[0])[0]
        agree = (_close(a, b, rtol) for a, b in zip(_tensors(output), _tensors(expected), strict=True))
        if whole is not None and not all(agree):
            raise NotCapturable("capture: model must give what its graph gives, got other outputs (dropout, chance?)")
        self.work = 0.0
        return output

    def _step(self, state: State, position: int) -> State:
        """Run segment ``position + 1`` under the streams' own weights."""
        values = self._run(position + 1, state, {})
        live = self._live[position + 2]
        values |= {n: v for n, v in state.values.items() if n in live}
        return State(position + 1, values, state.samples, state.overrides)

    def _count(self, index: int, rows: int) -> None:
        if self._forward_flops:
            self.work += self._flops[index] / self._forward_flops * rows

    def _check_at(self, state: State, layer: int) -> None:
        require(state.position == 2 * layer, "fork", "state", f"stand at layer {layer}", f"position {state.position}")

    def _run(self, index: int, state: State, weights: Overrides) -> dict[Node, Any]:
        segment = self._segments[index]
        self._count(index, state.samples * state.streams)
        if not any(segment.weights.intersection(o) for o in state.overrides):
            return self._call(segment, state.values, weights, state.samples * state.streams)
        # A weight used again further on: every stream runs under its own.
        parts = [
            self._call(
                segment, {n: self._stream(state, n, s) for n in segment.values}, {**own, **weights}, state.samples
            )
            for s, own in enumerate(state.overrides)
        ]
        return {n: self._stack([part[n] for part in parts], n) for n in segment.outputs}

    def _call(self, segment: _Segment, values: dict[Node, Any], weights: Overrides, batch: int) -> dict[Node, Any]:
        arguments = [values[n] for n in segment.values]
        arguments += [self._constant(n, weights) for n in segment.constants]
        arguments += [self._size(n, batch) for n in segment.sizes]
        return dict(zip(segment.outputs, segment.function(*arguments), strict=True))

    def _constant(self, node: Node, weights: Overrides) -> Any:
        if not weights or not self._depends[node].intersection(weights):
            return self.captured.constants[node]
        if node in weights:
            return weights[node]
        return evaluate(node, lambda n: self._constant(n, weights))

    def _size(self, node: Node, batch: int) -> int:
        key = (node, batch)
        if key not in self._sizes:
            value = node.meta["val"]
            self._sizes[key] = (
                int(value.node.expr.subs(self.captured.batch, batch)) if isinstance(value, torch.SymInt) else value
            )
        return self._sizes[key]

    def _stack(self, parts: Sequence[Any], node: Node) -> Any:
        return _stack(parts, node.meta["val"])

    def _stream(self, state: State, node: Node, stream: int) -> Any:
        return _slice(state.values[node], node.meta["val"], stream, state.streams)

    def _weights_behind(self, node: Node) -> frozenset[Node]:
        if node in self._weights:
            return frozenset([node])
        return (
            frozenset().union(*(self._weights_behind(n) for n in node.all_input_nodes))
            if node.op != "placeholder"
            else frozenset()
        )

    def _first_uses(self) -> list[int]:
        starts: dict[int, int] = {}
        for index, node in enumerate(self.captured.nodes):
            for argument in node.all_input_nodes:
                for weight in self._depends.get(argument, ()):
                    starts.setdefault(self._weights[weight], index)
        return [starts[k] for k in range(self.num_layers)]

    def _liveness(self, bounds: Sequence[int]) -> list[frozenset[Node]]:
        """Values that exist before each bound and are needed at or after it."""
        nodes = self.captured.nodes
        produced = {node: index for index, node in enumerate(nodes)} | dict.fromkeys(self.captured.inputs, -1)
        last = self._last_uses()
        return [frozenset(n for n, made in produced.items() if made < bound <= last.get(n, -1)) for bound in bounds]

    def _last_uses(self) -> dict[Node, int]:
        """Index of the last node that reads each value; the outputs are read after the last one."""
        nodes = self.captured.nodes
        live = {*nodes, *self.captured.inputs}
        last = {node: len(nodes) for node in self.captured.outputs if isinstance(node, Node)}
        for index, node in enumerate(nodes):
            for argument in node.all_input_nodes:
                if argument in live:
                    last[argument] = max(last.get(argument, -1), index)
        return last

    def _build(self, nodes: Sequence[Node], live: frozenset[Node]) -> _Segment:
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
        weights = frozenset().union(*(self._depends[n] for n in constants)) if constants else frozenset()
        return _Segment(GraphModule({}, graph).forward, values, constants, sizes, outputs, weights)


def _rows(tensor: Tensor, meta: Tensor, rows: int) -> Tensor:
    """``[rows, T, K]`` of a tensor whose batch dimension is that of ``meta`` and holds a multiple of the rows."""
    dim = _batch_dim(meta)
    assert dim is not None
    return tensor.movedim(dim, 0).reshape(rows, -1, tensor.shape[-1] if dim != tensor.dim() - 1 else 1)


def _outer_pays(positions: float, variants: int) -> bool:
    """Whether one product for the outer product and a small one per variant is less than a product per variant."""
    return positions * variants > positions + variants


def _outer_products(x: Tensor, g: Tensor, clean: Tensor, variants: Sequence[Tensor]) -> Tensor:
    """⟨gᵀx, variant − clean⟩ per row for x ``[rows, T, K]``, g ``[rows, T, N]``, weights ``[N, K]``: ``[rows, variants]``."""
    weights = torch.stack([v.reshape(clean.shape) - clean for v in variants], -1).flatten(0, 1)
    size = max(1, _OUTER_ELEMENTS // clean.numel())
    parts = zip(x.split(size), g.split(size), strict=True)
    return torch.cat([torch.bmm(q.transpose(1, 2), p).flatten(1) @ weights for p, q in parts])


def _patches(node: Node, x: Tensor, gradient: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Convolution as a product: inputs ``[rows, groups, positions, K]`` and output gradients ``[rows, groups, positions, N]``."""
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False))
    given |= node.kwargs
    stride, dilation = (_two(given.get(name, 1)) for name in ("stride", "dilation"))
    padding, groups, kernel = given.get("padding", 0), given.get("groups", 1), shape[2:]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    else:
        total = [2 * p for p in _two(padding)]
    (top, left), (height, width) = [t // 2 for t in total], total
    x = torch.nn.functional.pad(x, (left, width - left, top, height - top))
    columns = torch.nn.functional.unfold(x, tuple(kernel), dilation, 0, stride).unflatten(1, (groups, -1))
    return columns.transpose(2, 3), gradient.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)


def _two(value: Any) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return both if len(both) == 2 else both * 2  # type: ignore[return-value]


def _batch_dim(meta: Tensor) -> int | None:
    """The dimension that counts samples, from the symbolic shape."""
    symbolic = [d for d, size in enumerate(meta.shape) if isinstance(size, torch.SymInt)]
    return symbolic[0] if symbolic else None


def _stack(parts: Sequence[Any], meta: Any) -> Any:
    if isinstance(meta, (tuple, list)):
        return tuple(_stack([part[k] for part in parts], m) for k, m in enumerate(meta))
    dim = _batch_dim(meta)
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(list(parts), dim)


def _slice(value: Any, meta: Any, stream: int, streams: int) -> Any:
    if isinstance(meta, (tuple, list)):
        return tuple(_slice(v, m, stream, streams) for v, m in zip(value, meta, strict=True))
    dim = _batch_dim(meta)
    if dim is None:
        return value
    size = value.shape[dim] // streams
    return value.narrow(dim, stream * size, size)


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def _close(got: Any, wanted: Any, rtol: float) -> bool:
    if isinstance(wanted, (tuple, list)):
        return all(_close(g, w, rtol) for g, w in zip(got, wanted, strict=True))
    if got.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return torch.equal(got, wanted)
    largest = torch.where(torch.isfinite(wanted), wanted, 0).abs().max().item()
    return torch.allclose(got, wanted, rtol=0, atol=rtol * largest, equal_nan=True)

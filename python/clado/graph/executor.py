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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..common import require, sample_count
from ..quant import InputRounding, Layer, Variant
from .capture import Captured, NotCapturable, evaluate, is_size
from .cuts import Cuts
from .flops import FlopCounter
from .moments import Use
from .rehearsal import LiveBytes
from .runner import Objective, Runner, Variants
from .slopes import Tap, outer_pays, slopes
from .streams import changes, close, first_stream, of_stream, stacked, stream_major, tensors

Overrides = dict[Node, Variant]


@dataclass(frozen=True)
class State:
    """Live values at a position.

    Attributes:
        position: 2k before layer k's node, 2k + 1 behind it (:meth:`Executor.fork` steps over it), 2L at the end, -1 before
            the first node. Segment ``position + 1`` leads to the next position.
        values: tensor (or tuple of tensors) per live node, streams stacked along the batch dimension, last fork outermost.
        samples: samples per stream.
        overrides: per stream, the perturbed weights it runs under, and how their layers' inputs are rounded.
    """

    position: int
    values: dict[Node, Any]
    samples: int
    overrides: tuple[Overrides, ...]

    @property
    def streams(self) -> int:
        return len(self.overrides)


class Executor:
    """Shared-prefix execution of a captured graph.

    Attributes:
        work: multiply-add work done so far in forward-equivalents times samples, counted over the nodes that really ran.
        stack: how many variants of a layer callers fork into at once; None: all. ``held``: how many variants' outputs they keep.
    """

    stack: int | None = None
    held: int | None = None
    stacks = True
    note: str | None = None

    def __init__(self, captured: Captured, cuts: Cuts | None = None) -> None:
        self.captured = captured
        self.cuts = cuts or Cuts(captured)
        self.work = 0.0
        self._flops = [0.0] * (len(self.cuts.bounds) - 1)  # of every segment
        self._forward_flops = 0.0  # of the model's own forward, the unit of work
        self._product_flops: dict[int, float] = {}
        self._rounded: dict[tuple[InputRounding, int], tuple[Tensor, Tensor]] | None = (
            None  # while variants of a layer run
        )

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
    def kept(self) -> list[Tensor]:
        """Parameters, buffers and what is computed from them alone."""
        return tensors(list(self.captured.constants.values()))

    @property
    def sample_bytes(self) -> int:
        """Of the largest activation of a sample."""
        sizes = [1]
        for tensor in tensors([node.meta["val"] for node in self.captured.nodes]):
            fixed = (int(size) for size in tensor.shape if not isinstance(size, torch.SymInt))
            sizes.append(math.prod(fixed) * tensor.element_size())
        return max(sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        found: torch.device = self.captured.constants[self.captured.sources[0][0]].device
        return found

    @property
    def forward_flops(self) -> float:
        """Of the model's own forward, per sample; needs :meth:`self_test`."""
        return self._forward_flops

    @property
    def forward_share(self) -> float:
        """What a clean pass takes of the model's own forward: less than 1 where positions are read by nobody."""
        return sum(self._flops) / self._forward_flops

    @property
    def suffix_share(self) -> list[float]:
        """For each layer, the share of a forward's multiply-adds from its node to the end; needs :meth:`self_test`."""
        return [sum(self._flops[2 * k + 1 :]) / self._forward_flops for k in range(self.num_layers)]

    def slope_share(self, counts: Sequence[int]) -> list[float]:
        """For each layer, what derivatives by the weights of it and later ones take beyond a product each (:meth:`products`)."""
        extra = []
        for k, (start, count) in enumerate(zip(self.cuts.starts, counts, strict=True)):
            shape = getattr(self.captured.nodes[start].meta["val"], "shape", ())
            sizes = [size for size in shape if not isinstance(size, torch.SymInt)]
            positions = math.prod(sizes) / self.captured.layers[k].shape[0]
            factor = 1 + count / positions if outer_pays(positions, count) else count
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

    def fork(self, state: State, layer: int, variants: Sequence[Variant | Tensor]) -> State:
        """Step over ``layer``'s node under each of ``variants``: S streams become len(variants)·S, variant-major."""
        self._check_at(state, layer)
        after = self.cuts.live[2 * layer + 2]
        changed = [self._override(layer, variant) for variant in variants]
        with self._rounding_once():
            parts = [self._run(2 * layer + 1, state, weights) for weights in changed]
        values = {n: stacked([state.values[n]] * len(variants), n.meta["val"]) for n in state.values if n in after}
        values |= {n: stacked([part[n] for part in parts], n.meta["val"]) for n in parts[0]}
        overrides = tuple({**old, **weights} for weights in changed for old in state.overrides)
        return State(2 * layer + 1, values, state.samples, overrides)

    def rebase(self, variants: Mapping[int, Variant]) -> None:
        own: Overrides = {}
        rounds = dict(self.captured.rounds)
        for layer, variant in variants.items():
            own |= self._override(layer, variant)
            rounds.pop(self.captured.sources[layer][0], None)
            if variant.rounds is not None:
                rounds[self.captured.sources[layer][0]] = variant.rounds
        constants = {node: self._constant(node, own) for node in self.captured.constants}
        self.captured = replace(self.captured, constants=constants, rounds=rounds)

    def outputs(self, state: State) -> list[Any]:
        """The model's output under every stream."""
        end = self.advance(state, self.num_layers)

        def leaf(node: Any, stream: int) -> Any:
            if node in end.values:
                return self._stream(end, node, stream)
            return self.captured.constants[node] if isinstance(node, Node) else node

        unflatten = self.captured.unflatten
        return [unflatten([leaf(n, s) for n in self.captured.outputs]) for s in range(end.streams)]

    def finish(self, state: State) -> Any:
        """The model's nest of outputs with the streams in front, ``[S, N, …]``."""
        end = self.advance(state, self.num_layers)
        return self.captured.unflatten([self._finished(node, end) for node in self.captured.outputs])

    def _finished(self, node: Any, end: State) -> Any:
        """An output under every stream; what is no tensor as it is."""
        if not isinstance(node, Node):
            return node
        if node in end.values:
            return stream_major(end.values[node], node.meta["val"], end.streams)
        constant = self.captured.constants[node]
        return torch.stack([constant] * end.streams) if isinstance(constant, Tensor) else constant

    def clean(self, state: State) -> Any:
        """The clean output from a state without perturbations."""
        return first_stream(self.finish(state))

    def changes(self, finished: Any, clean: Any) -> Any:
        """Changes δ ``[S, N, …]`` from what :meth:`finish` gave; a single tensor is overwritten."""
        return changes(finished, clean)

    def products(self, state: State, variants: Variants, objective: Objective) -> Tensor:
        """As :meth:`Runner.products`: one forward to the end, one backward down to the output of the next layer.

        The derivative by a weight is never summed over samples: per sample it is the outer product of what enters and of the
        gradient of what leaves the layer.
        """
        first, count = state.position // 2, state.streams * state.samples
        at_cut = state.position == 2 * first
        require(at_cut, "products", "state", "stand at a layer's cut", f"position {state.position}")
        ends = [0, *itertools.accumulate(len(own) for own in variants[first:])]
        out = torch.zeros(ends[-1], count, dtype=torch.float64, device=variants[0][0].weight.device)
        counter = FlopCounter() if first not in self._product_flops else contextlib.nullcontext()
        with counter:
            values, taps = self._record(state, first)
            with torch.enable_grad():
                total = objective(State(2 * self.num_layers, values, state.samples, state.overrides))
            found = gradients(total, [tap.output for tap in taps])
            for tap, gradient in zip(taps, found, strict=True):
                if gradient is not None:
                    k = tap.layer - first
                    out[ends[k] : ends[k + 1]] += self._slopes(tap, gradient, variants[tap.layer], count).T.double()
        if isinstance(counter, FlopCounter):
            self._product_flops[first] = counter.get_total_flops() / count
        self.work += self._product_flops[first] / self._forward_flops * count
        return out.view(-1, state.streams, state.samples)

    def inputs(self, batch: Any, see: Callable[[int, Use, Tensor], None]) -> None:
        state = self.start(batch)
        values: dict[Node, Any] = dict(state.values)
        for index, node in enumerate(self.captured.nodes):
            layer = self.cuts.applied(node)
            if layer is not None:
                entered = node.args[0]
                assert isinstance(entered, Node)
                x = values[entered] if entered in values else self._constant(entered, {})
                see(layer, Use.of_node(node, self.captured.layers[layer].shape), x)
            values[node] = self._evaluate(node, values, {}, state.samples)
            for dead in self.cuts.dying[index]:
                values.pop(dead, None)
        self.work += self.forward_share * state.samples

    def _slopes(self, tap: Tap, gradient: Tensor, variants: Sequence[Variant], count: int) -> Tensor:
        sources = self.captured.sources[tap.layer]

        def under(variant: Variant | None) -> Tensor:
            own = {} if variant is None else self._override(tap.layer, variant)
            found: Tensor = self._evaluate(tap.node, tap.inputs, own, count)
            return found

        clean = Variant(self.captured.constants[sources[0]], self.captured.rounds.get(sources[0]))
        with self._rounding_once():
            return slopes(tap, gradient, clean, variants, sources, under, count)

    def _record(self, state: State, first: int) -> tuple[dict[Node, Any], list[Tap]]:
        """Run to the end with autograd on from the first use of a weight of ``first`` or a later layer."""
        values, taps = dict(state.values), []
        with torch.enable_grad():
            for index in range(self.cuts.starts[first], len(self.captured.nodes)):
                node = self.captured.nodes[index]
                values[node] = output = self._node(node, values, state)
                for layer in sorted({self.cuts.layer_of[w] for w in self.cuts.weights(node)}):
                    if layer >= first:
                        if not output.requires_grad:
                            output.requires_grad_()
                        inputs = {a: values[a].detach() for a in node.all_input_nodes if a in values}
                        taps.append(Tap(layer, node, inputs, output))
                for dead in self.cuts.dying[index]:
                    values.pop(dead, None)
        return values, taps

    def _node(self, node: Node, values: dict[Node, Any], state: State) -> Any:
        """One node for all streams, each under its own weights."""
        used = self.cuts.weights(node)
        if not any(used.intersection(o) for o in state.overrides):
            return self._evaluate(node, values, {}, state.samples * state.streams)
        meta = {a: a.meta["val"] for a in node.all_input_nodes if a in values}
        parts = []
        for s, own in enumerate(state.overrides):
            mine = {a: of_stream(values[a], m, s, state.streams) for a, m in meta.items()}
            parts.append(self._evaluate(node, mine, own, state.samples))
        return stacked(parts, node.meta["val"])

    def _evaluate(self, node: Node, values: dict[Node, Any], weights: Overrides, batch: int) -> Any:
        rounds = self._rounds(node, weights)

        def value(argument: Node) -> Any:
            if rounds is not None and argument is node.args[0]:
                return self._round(rounds, values[argument])
            if argument in values:
                return values[argument]
            return self.cuts.size(argument, batch) if is_size(argument) else self._constant(argument, weights)

        return evaluate(node, value)

    def _override(self, layer: int, variant: Variant | Tensor) -> Overrides:
        return dict.fromkeys(self.captured.sources[layer], Variant.of(variant))

    def _rounds(self, node: Node, weights: Overrides) -> InputRounding | None:
        """How what a node applies a weight to is rounded."""
        source = self.cuts.applies.get(node)
        if source is None:
            return None
        return weights[source].rounds if source in weights else self.captured.rounds.get(source)

    def _round(self, rounds: InputRounding, x: Tensor) -> Tensor:
        if self._rounded is None:
            return rounds(x)
        key = (rounds, id(x))
        if key not in self._rounded:
            self._rounded[key] = (x, rounds(x))  # what is known by its address stays
        return self._rounded[key][1]

    @contextlib.contextmanager
    def _rounding_once(self) -> Iterator[None]:
        """Variants that round an input alike share the rounded one."""
        self._rounded = {}
        try:
            yield
        finally:
            self._rounded = None

    def only(self, layers: Sequence[int]) -> Executor:
        captured = self.captured
        chosen, sources = (tuple(part[k] for k in layers) for part in (captured.layers, captured.sources))
        return self._like(replace(captured, layers=chosen, sources=sources), None)  # type: ignore[arg-type]

    def rehearsed(
        self, measure: Callable[[Runner, Variants, Any], object], variants: Variants, example: Any, samples: int
    ) -> int | None:
        # No node of the graph is changed, and no value without data may stay behind in the runner that will run.
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:

            def unreal(value: Any) -> Any:
                return fake.from_tensor(value) if isinstance(value, Tensor) else value

            constants = {node: unreal(value) for node, value in self.captured.constants.items()}
            fakes = {id(v.weight): unreal(v.weight) for own in variants for v in own}
            weights = [[replace(variant, weight=fakes[id(variant.weight)]) for variant in own] for own in variants]
            twin = self._like(replace(self.captured, constants=constants), self.cuts)
            twin._flops, twin._forward_flops = [1.0] * len(twin._flops), 1.0
            batch = pytree.tree_map(lambda t: t.new_empty((samples, *t.shape[1:])), example)
            try:
                with (
                    warnings.catch_warnings(),
                    LiveBytes(self.device, (constants, list(fakes.values()), batch)) as live,
                ):
                    warnings.simplefilter("ignore")  # addresses of tensors without data
                    measure(twin, weights, batch)
            except Exception:  # whatever an operator says to tensors without data
                return None
        found: int | None = live.peak
        return found

    def take_costs(self, other: Executor) -> None:
        """What the segments of the same graph cost, where another runner counted it."""
        self._flops, self._forward_flops = other._flops, other._forward_flops

    def _like(self, captured: Captured, cuts: Cuts | None) -> Executor:
        """A runner of this kind with other constants or other layers."""
        made = Executor(captured, cuts)
        made.stack, made.held = self.stack, self.held
        return made

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
        with FlopCounter() as counter:
            expected = None if whole is None else whole(batch)
        self._forward_flops = counter.get_total_flops() / sample_count(batch)
        other = pytree.tree_map(lambda x: x * 0.5 if x.is_floating_point() else x[:1].expand_as(x), batch)
        states = [self.start(batch), self.start(other)]
        for position in range(-1, 2 * self.num_layers):
            states = self._try_segment(states, position, rtol)
        require(sum(self._flops) > 0, "capture", "model", "do matrix products", "none counted")
        self._forward_flops = self._forward_flops or sum(self._flops)
        output = self.outputs(states[0])[0]
        agree = (close(a, b, rtol) for a, b in zip(tensors(output), tensors(expected), strict=True))
        if whole is not None and not all(agree):
            raise NotCapturable("capture: model must give what its graph gives, got other outputs (dropout, chance?)")
        self.work = 0.0
        return output

    def _try_segment(self, states: Sequence[State], position: int, rtol: float) -> list[State]:
        """Carry two states over a segment, apart and stacked, and count its work."""
        values = {n: stacked([s.values[n] for s in states], n.meta["val"]) for n in states[0].values}
        both = self._step(State(position, values, states[0].samples, ({}, {})), position)
        with FlopCounter() as counter:
            first = self._step(states[0], position)
        self._flops[position + 1] = counter.get_total_flops() / first.samples
        moved = [first, self._step(states[1], position)]
        for node, value in both.values.items():
            if not close(value, stacked([s.values[node] for s in moved], node.meta["val"]), rtol):
                layer = self.captured.layers[min(max(position, 0) // 2, self.num_layers - 1)].name
                raise NotCapturable(
                    f"capture: model must treat samples independently, got {node} near layer {layer} "
                    "that changes when batches are stacked (batch statistics, dropout or a mixed batch dimension?)"
                )
        return moved

    def _step(self, state: State, position: int) -> State:
        """Run segment ``position + 1`` under the streams' own weights."""
        values = self._run(position + 1, state, {})
        live = self.cuts.live[position + 2]
        values |= {n: v for n, v in state.values.items() if n in live}
        return State(position + 1, values, state.samples, state.overrides)

    def _count(self, index: int, rows: int) -> None:
        if self._forward_flops:
            self.work += self._flops[index] / self._forward_flops * rows

    def _check_at(self, state: State, layer: int) -> None:
        require(state.position == 2 * layer, "fork", "state", f"stand at layer {layer}", f"position {state.position}")

    def _run(self, index: int, state: State, weights: Overrides) -> dict[Node, Any]:
        segment = self.cuts.segments[index]
        self._count(index, state.samples * state.streams)
        if not any(segment.weights.intersection(o) for o in state.overrides):
            return self._call(index, state.values, weights, state.samples * state.streams)
        # A weight used again further on: every stream runs under its own.
        parts = [
            self._call(index, {n: self._stream(state, n, s) for n in segment.values}, {**own, **weights}, state.samples)
            for s, own in enumerate(state.overrides)
        ]
        return {n: stacked([part[n] for part in parts], n.meta["val"]) for n in segment.outputs}

    def _call(self, index: int, values: dict[Node, Any], weights: Overrides, batch: int) -> dict[Node, Any]:
        segment = self.cuts.segments[index]
        if any(self._rounds(node, weights) is not None for node in segment.applied):
            return self._interpret(index, values, weights, batch)
        arguments = [values[n] for n in segment.values]
        arguments += [self._constant(n, weights) for n in segment.constants]
        arguments += [self.cuts.size(n, batch) for n in segment.sizes]
        return dict(zip(segment.outputs, segment.function(*arguments), strict=True))

    def _interpret(self, index: int, values: dict[Node, Any], weights: Overrides, batch: int) -> dict[Node, Any]:
        """A segment node by node, inputs rounded where weights are applied."""
        segment, known = self.cuts.segments[index], {n: values[n] for n in self.cuts.segments[index].values}
        outputs = set(segment.outputs)
        for k in range(self.cuts.bounds[index], self.cuts.bounds[index + 1]):
            node = self.captured.nodes[k]
            known[node] = self._evaluate(node, known, weights, batch)
            for dead in self.cuts.dying[k]:
                if dead not in outputs:
                    known.pop(dead, None)
        return {node: known[node] for node in segment.outputs}

    def _constant(self, node: Node, weights: Overrides) -> Any:
        if not weights or not self.cuts.depends[node].intersection(weights):
            return self.captured.constants[node]
        if node in weights:
            return weights[node].weight
        return evaluate(node, lambda n: self._constant(n, weights))

    def _stream(self, state: State, node: Node, stream: int) -> Any:
        return of_stream(state.values[node], node.meta["val"], stream, state.streams)


def gradients(total: Tensor, outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """∂ total / ∂ output for every output, None where total does not depend on it."""
    if not total.requires_grad:
        return [None] * len(outputs)
    return torch.autograd.grad(total, outputs, allow_unused=True)

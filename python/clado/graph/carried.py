"""Low precision that is right: the difference to the clean forward is carried through the graph (docs/numerics.md).

A perturbed forward in TF32 or bfloat16 rounds relative to the activations and loses the change that is sought, a thousandth of
them. Here every value is a clean tensor, computed once per batch in float32 and shared by all perturbations, and a difference d,
stacked over streams. Products act on d under a rule, so that their rounding is relative to d; what is linear acts on d as it is;
everything else is f(x + d) − f(x) in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..quant import InputRounding, Variant
from .capture import Captured
from .carried_rules import PRODUCTS, RULES
from .cuts import Cuts
from .differences import Clean, Differences, Unsplit, repeated
from .executor import Executor, Overrides, State
from .precision import Precision
from .streams import stacked, stream_major


class CarriedExecutor(Executor):
    """An :class:`Executor` whose states hold differences. :meth:`finish` returns logit changes.

    A live value that is missing from a state is clean.
    """

    def __init__(self, captured: Captured, precision: str, cuts: Cuts | None = None) -> None:
        super().__init__(captured, cuts)
        self.precision = Precision(precision, self.device)
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of any batch or weight."""
        self._clean = Clean(self.captured, self.cuts, self.precision)
        self._changes: dict[tuple[Node, int], Tensor] = {}
        self._batch: Any = None

    def start(self, batch: Any) -> State:
        """Run the clean forward once per batch and keep its values."""
        state = super().start(batch)
        if batch is not self._batch:
            values = dict(state.values)
            for node in self.captured.nodes:
                values[node] = self._evaluate(node, values, {}, state.samples)
            self._clean.of_batch(values, state.samples)
            self._batch = batch
            self.work += state.samples
        return State(-1, {}, state.samples, ({},))

    def fork(self, state: State, layer: int, variants: Sequence[Variant | Tensor]) -> State:
        self._check_at(state, layer)
        node, after = self.captured.nodes[self.cuts.starts[layer]], self.cuts.live[2 * layer + 2]
        changed = [self._override(layer, variant) for variant in variants]
        self._count(2 * layer + 1, state.samples * state.streams * len(variants))
        results = self._perturbed(node, self._differences(state), changed)
        values = {n: repeated(v, n.meta["val"], len(variants)) for n, v in state.values.items() if n in after}
        values[node] = stacked(results, node.meta["val"])
        overrides = tuple({**old, **weights} for weights in changed for old in state.overrides)
        return State(2 * layer + 1, values, state.samples, overrides)

    def _finished(self, node: Any, end: State) -> Any:
        """The change of a floating-point output under every stream; others as they are."""
        at = self._differences(end)
        if not (isinstance(node, Node) and at.varies(node)):
            found = super()._finished(node, end)
            return torch.zeros_like(found) if isinstance(found, Tensor) and found.is_floating_point() else found
        clean, found = self._clean.values[node], end.values.get(node)
        if isinstance(found, Unsplit) or not clean.is_floating_point():
            return stream_major(at.total(node), node.meta["val"], end.streams)
        if found is None:
            return clean.new_zeros(end.streams, *clean.shape)
        return stream_major(found.float(), node.meta["val"], end.streams)

    def outputs(self, state: State) -> list[Any]:
        end = self.advance(state, self.num_layers)
        at = self._differences(end)
        values = {n: at.total(n) for n in self.captured.outputs if at.varies(n)}
        return super().outputs(State(end.position, values, end.samples, end.overrides))

    def clean(self, state: State) -> Any:
        known = {**self.captured.constants, **self._clean.values}
        return self.captured.unflatten([known[n] if isinstance(n, Node) else n for n in self.captured.outputs])

    def changes(self, finished: Any, clean: Any) -> Any:
        return finished

    def rebase(self, variants: Mapping[int, Variant]) -> None:
        super().rebase(variants)
        self._forget()

    def _like(self, captured: Captured, cuts: Cuts | None) -> CarriedExecutor:
        made = CarriedExecutor(captured, self.precision.name, cuts)
        made.stack, made.held = self.stack, self.held
        return made

    def _differences(self, state: State) -> Differences:
        return Differences(self._clean, dict(state.values), state.streams)

    def _step(self, state: State, position: int) -> State:
        at, live = self._differences(state), self.cuts.live[position + 2]
        moved = False
        for index in range(self.cuts.bounds[position + 1], self.cuts.bounds[position + 2]):
            node = self.captured.nodes[index]
            if node not in at.d:
                found = self._difference(node, at, state.overrides)
                if found is not None:
                    at.d[node] = found
                    moved = True
            for dead in self.cuts.dying[index]:  # what is freed at once is used again: fresh memory costs page faults
                at.d.pop(dead, None)
        if moved:
            self._count(position + 1, state.samples * state.streams)
        return State(position + 1, {n: v for n, v in at.d.items() if n in live}, state.samples, state.overrides)

    def _difference(self, node: Any, at: Differences, overrides: Sequence[Overrides]) -> Any:
        """Difference of a node's output under every stream, None where nothing reached it."""
        used = self.cuts.weights(node)
        if used and any(used.intersection(own) for own in overrides):
            return self._own_weights(node, at, overrides)
        moving = [a for a in node.all_input_nodes if at.moved(a)]
        if not moving:
            return None
        if any(isinstance(at.d[a], Unsplit) for a in moving) or self._rounds(node, {}) is not None:
            return self._recompute(node, at)
        rule = RULES.get(node.target)
        found = None if rule is None else rule(node, at)
        return self._recompute(node, at) if found is None else found

    def _own_weights(self, node: Any, at: Differences, overrides: Sequence[Overrides]) -> Any:
        """A weight that is used again further on: every stream runs under its own."""
        parts = []
        for s, own in enumerate(overrides):
            mine = {a: at.of_stream(a, s) for a in node.all_input_nodes if at.moved(a)}
            parts += self._perturbed(node, Differences(self._clean, mine, 1), [own])
        return stacked(parts, node.meta["val"])

    def _perturbed(self, node: Any, at: Differences, weights: Sequence[Overrides]) -> list[Any]:
        """Differences of a node under each of several weights, streams stacked: d·Wᵀ + (x + d)·ΔWᵀ where it is a product.

        Where the input is rounded to y = Q(x + d), y takes the place of x + d, and y − x that of d: y·(W + ΔW)ᵀ − x·Wᵀ without
        cancellation.
        """
        x: Any = node.args[0]
        w: Any = node.args[1] if len(node.args) > 1 else None
        product = PRODUCTS.get(node.target)
        simple = isinstance(x, Node) and at.varies(x) and isinstance(w, Node) and not at.varies(w)
        if product is None or not simple or isinstance(at.d.get(x), Unsplit) or self._rounds(node, {}) is not None:
            return [self._recompute(node, at, own) for own in weights]
        d, out = at.d.get(x), []
        operands: dict[
            InputRounding | None, tuple[Any, Any]
        ] = {}  # what enters, and what the clean weight makes of its change
        for own in weights:
            rounds = self._rounds(node, own)
            if rounds not in operands:
                total, change = self._entry(x, at, rounds)
                held = None if change is None else self.precision.operand(change)
                made = None if held is None else product(node, at, held, self._clean.operand(w))
                operands[rounds] = self.precision.operand(total), made
            entry, base = operands[rounds]
            moved = product(node, at, entry, self._change(w, own))
            moved = moved if base is None else moved.add_(base)
            out.append(repeated(moved, node.meta["val"], at.streams) if d is None else moved)
        return out

    def _entry(self, x: Node, at: Differences, rounds: InputRounding | None) -> tuple[Tensor, Tensor | None]:
        """What enters a product with a perturbed weight, and its difference to the clean input; of all streams where d is."""
        d = at.d.get(x)
        total: Tensor = at.x(x) if d is None else at.total(x)
        if rounds is None:
            return total, d
        y = rounds(total)
        return y, y - total if d is None else at.without_clean(y, x)

    def _recompute(self, node: Any, at: Differences, weights: Overrides | None = None) -> Any:
        """f(x + d) − f(x), in float32."""
        totals = {a: at.total(a) for a in node.all_input_nodes if at.varies(a)}
        result = self._evaluate(node, totals, weights or {}, self._clean.samples * at.streams)
        return at.without_clean(result, node)

    def _change(self, weight: Node, own: Overrides) -> Tensor:
        """Δ of a weight, ready for a product; kept, since every chunk and pair needs it again."""
        variant = self._constant(weight, own)
        key = (weight, variant.data_ptr())
        if key not in self._changes:
            self._changes[key] = self.precision.operand(variant - self.captured.constants[weight])
        return self._changes[key]

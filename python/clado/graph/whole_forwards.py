"""Models that cannot be exported: whole forwards, every stream under its own weights. Same results, no shared prefixes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common import require, sample_count
from ..quant import Call, Calls, Layer, Readers, Variant, has_rows, ignored, storage
from .executor import gradients
from .flops import FlopCounter
from .forward import ForwardStep, Step, check_eval, generator_states, plain_call
from .moments import Use
from .runner import Objective, Runner, Variants
from .streams import changes, check_same_shapes, close, stacked_outputs, tensors
from .weights import layer_of, unsearched


@dataclass(frozen=True)
class WholeState:
    """Where a graph's state has live values, this one has the batch, and at the end the outputs.

    Attributes:
        variants: per stream {layer: its perturbed weight, and how its input is rounded}.
    """

    position: int
    batch: Any
    samples: int
    variants: tuple[dict[int, Variant], ...]
    results: tuple[Any, ...] | None = None

    @property
    def streams(self) -> int:
        return len(self.variants)


class WholeForwards:
    """A :class:`Runner` by whole forwards, with weights swapped by ``functional_call``.

    Attributes:
        layers: weights in the order in which they are first applied.
        skipped: layers kept in float, with the reason.
        work: forwards done so far times samples.
    """

    stack: int | None = None
    held: int | None = None
    stacks = False
    kept: tuple[Tensor, ...] = ()
    sample_bytes = None
    forward_flops = 0.0  # counted by the self-test
    forward_share = 1.0

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        ignore: Sequence[str] = (),
        quantize_ends: bool = False,
        forward_step: ForwardStep | None = None,
        note: str | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        check_eval(model)
        self.work, self.note = 0.0, note
        self._device = next(model.parameters()).device
        self._step = Step(model, forward_step or plain_call).eval()
        self._base: dict[str, Variant] = {}  # clean weights other than the model's, and input roundings, by layer
        self._parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
        found, others = self._find_layers(example)
        keep = ignored(found, ignore, quantize_ends, only) if found else {}
        self.skipped = {**others, **keep}
        self.layers = tuple(layer for layer in found if layer.name not in keep)
        require(len(self.layers) > 0, "capture", "model", "have at least one layer to quantize", "none")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def suffix_share(self) -> list[float]:
        """Nothing is shared: every layer's suffix is the whole forward."""
        return [1.0] * self.num_layers

    def slope_share(self, counts: Sequence[int]) -> list[float]:
        return [0.0] * self.num_layers

    def start(self, batch: Any) -> WholeState:
        return WholeState(-1, batch, sample_count(batch), ({},))

    def advance(self, state: WholeState, layer: int) -> WholeState:
        """At the end: one forward per stream."""
        if layer == self.num_layers and state.results is None:
            state = replace(
                state, results=tuple(self._forward(state.batch, own, state.samples) for own in state.variants)
            )
        return replace(state, position=2 * layer)

    def fork(self, state: WholeState, layer: int, variants: Sequence[Variant | Tensor]) -> WholeState:
        given = map(Variant.of, variants)
        changed = tuple({**own, layer: variant} for variant in given for own in state.variants)
        return replace(state, position=2 * layer + 1, variants=changed, results=None)

    def outputs(self, state: WholeState) -> list[Any]:
        results = self.advance(state, self.num_layers).results
        assert results is not None
        return list(results)

    def finish(self, state: WholeState) -> Any:
        return stacked_outputs(self.outputs(state), "profile")

    def clean(self, state: WholeState) -> Any:
        return self.outputs(state)[0]

    def changes(self, finished: Any, clean: Any) -> Any:
        return changes(finished, clean)

    def products(self, state: WholeState, variants: Variants, objective: Objective) -> Tensor:
        """As :meth:`Runner.products`; what each layer's change does to its output is computed per variant."""
        first = state.position // 2
        starts = [0, *itertools.accumulate(len(own) for own in variants[first:])]
        out = torch.zeros(starts[-1], state.streams, state.samples, dtype=torch.float64, device=self._device)
        taps: list[list[_Tap]] = []
        results = []
        for own in state.variants:
            taps.append([])
            with torch.enable_grad():
                results.append(self._forward(state.batch, own, state.samples, _recorder(taps[-1], first)))
        with torch.enable_grad():
            total = objective(replace(state, position=2 * self.num_layers, results=tuple(results)))
        places = self._places(state, first, taps[0])
        found = iter(gradients(total, [tap.output for own_taps in taps for tap in own_taps]))
        for stream, own_taps in enumerate(taps):
            for tap, place in zip(own_taps, places, strict=True):
                gradient = next(found)
                if gradient is not None:
                    values = self._slopes(tap, gradient, variants[tap.layer], place, state.samples)
                    start = starts[tap.layer - first]
                    out[start : start + len(values), stream] += values.to("cpu", torch.float64)
        self.work += 2 * state.streams * state.samples
        return out

    def _slopes(self, tap: _Tap, gradient: Tensor, variants: Sequence[Variant], place: _Place, samples: int) -> Tensor:
        """⟨gradient, change of a call's output⟩ by sample, ``[variants, samples]``."""
        layer, clean = self.layers[tap.layer], self._clean(tap.layer).weight
        shape = self._parameters[layer.names[0]].shape

        def change(variant: Variant) -> Tensor:
            delta = layer.parameter(variant.weight - clean, shape)
            if variant.rounds is None:
                return tap.call.under(delta)
            y = variant.rounds(tap.call.x)
            return tap.call.on(y).under(delta) + tap.call.on(y - tap.call.x).under(layer.parameter(clean, shape))

        return torch.stack([place.sums(change(variant) * gradient, samples) for variant in variants])

    def _places(self, state: WholeState, first: int, taps: Sequence[_Tap]) -> list[_Place]:
        """Where samples are in what enters the first stream's calls: a forward in which the first sample is another tells."""
        if state.samples == 1 or all(len(tap.call.x) == state.samples for tap in taps):
            return [_Place(0, 1)] * len(taps)
        seen: list[_Tap] = []
        other = pytree.tree_map(lambda leaf: torch.cat([leaf[1:2], leaf[1:]]), state.batch)
        with torch.no_grad():
            self._forward(other, state.variants[0], 0, _recorder(seen, first))
        places = [_place(a.call.x, b.call.x, state.samples) for a, b in zip(taps, seen, strict=True)]
        unknown = [tap.layer for tap, place in zip(taps, places, strict=True) if place is None]
        names = ", ".join(self.layers[k].name for k in unknown[:3])
        must = "keep samples apart in what enters its layers"
        require(not unknown, "gradient", "model", must, f"a mix before {names}")
        return [place for place in places if place is not None]

    def inputs(self, batch: Any, see: Callable[[int, Use, Tensor], None]) -> None:
        def record(layer: int, call: Call) -> Tensor:
            see(layer, Use.of_call(call.kind, self.layers[layer].shape, call.args, call.kwargs), call.x)
            return call.of(call.x)

        self._forward(batch, {}, sample_count(batch), record)

    def rebase(self, variants: Mapping[int, Variant]) -> None:
        self._base = {**self._base, **{self.layers[k].name: variant for k, variant in variants.items()}}

    def only(self, layers: Sequence[int]) -> WholeForwards:
        made = copy.copy(self)
        made.layers, made.work = tuple(self.layers[k] for k in layers), 0.0
        return made

    def rehearsed(
        self, measure: Callable[[Runner, Variants, Any], object], variants: Variants, example: Any, samples: int
    ) -> None:
        """Nobody knows: the model's own code runs."""

    def self_test(self, batch: Any, rtol: float = 1e-3) -> Any:
        """Check that samples do not mix and that nothing is drawn at random; returns the clean output.

        Raises:
            CladoError: a sample whose output depends on the others, or on chance.
        """
        with FlopCounter() as counter:
            whole = self._forward(batch, {}, 0)
        self.forward_flops = counter.get_total_flops() / sample_count(batch)
        again = self._forward(batch, {}, 0)
        alone = self._forward(pytree.tree_map(lambda leaf: leaf[:1], batch), {}, 0)
        first, other = ([tuple(t.shape[1:]) for t in tensors(output)] for output in (whole, alone))
        check_same_shapes("capture", first, other)
        same = all(
            close(a, b, rtol) and (a.dim() == 0 or close(a[:1], c, rtol))
            for a, b, c in zip(*map(tensors, (whole, again, alone)), strict=True)
        )
        require(
            same,
            "capture",
            "model",
            "treat samples independently",
            "outputs that depend on the rest of the batch, or on chance",
        )
        self.work = 0.0
        return whole

    def _clean(self, layer: int) -> Variant:
        """A layer's clean weight, in rows, and how its input is rounded."""
        known = self.layers[layer]
        return self._base[known.name] if known.name in self._base else Variant(known.weight(self._parameters))

    def _forward(
        self, batch: Any, own: dict[int, Variant], samples: int, record: Callable[[int, Call], Tensor] | None = None
    ) -> Any:
        """One forward under variants of its own; ``record`` makes the output of every layer, whose input is rounded by then."""
        self.work += samples
        under = {k: own.get(k, self._base.get(layer.name)) for k, layer in enumerate(self.layers)}
        changed = {
            name: self.layers[k].parameter(variant.weight, self._parameters[name].shape)
            for k, variant in under.items()
            if variant is not None
            for name in self.layers[k].names
        }
        weights = {f"model.{name}": weight for name, weight in changed.items()}
        rounds = {
            k: variant.rounds for k, variant in under.items() if variant is not None and variant.rounds is not None
        }

        def seen(layer: int, call: Call) -> Tensor:
            call = call.on(rounds[layer](call.x)) if layer in rounds else call
            return call.of(call.x) if record is None else record(layer, call)

        before = generator_states(self._device)
        with nullcontext() if record is None and not rounds else self._watch(changed, seen):
            output = torch.func.functional_call(self._step, weights, (batch,)) if weights else self._step(batch)
        drawn = generator_states(self._device) != before  # on these data, where a first forward drew nothing
        require(not drawn, "capture", "model", "draw nothing at random in eval mode (dropout, noise)", "a draw")
        return output

    def _watch(self, changed: Mapping[str, Tensor], record: Callable[[int, Call], Tensor]) -> Calls:
        position = {name: k for k, layer in enumerate(self.layers) for name in layer.names}
        own = {name: changed.get(name, self._parameters[name]) for name in position}
        return Calls(own, lambda call: record(position[call.part.name], call))

    def _find_layers(self, example: Any) -> tuple[list[Layer], dict[str, str]]:
        """The layers, and why the other parameters are none."""
        names: dict[Any, list[str]] = {}
        for name, parameter in self._parameters.items():
            names.setdefault(storage(parameter), []).append(name)
        key_of = {name: key for key, own in names.items() for name in own}
        samples = sample_count(example)
        uses: dict[Any, list[tuple[str, int, int]]] = {}

        def seen(call: Call) -> Tensor:
            output = call.of(call.x)
            uses.setdefault(key_of[call.part.name], []).append((call.applied, call.groups, call.macs(output, samples)))
            return output

        others = [*(p for p in self._step.parameters() if p.dim() < 2), *self._step.buffers()]
        calls = Readers(self._parameters, seen, others)
        with calls:
            self._step(example)
        layers = []
        for key, own in uses.items():
            kind, groups, _ = min(own, key=lambda use: not has_rows(use[0]))  # with output channels first, if any
            parameter = self._parameters[names[key][0]]
            layers.append(layer_of(names[key], parameter, kind, groups, sum(use[2] for use in own)))
        left = [own for key, own in names.items() if key not in uses]
        return layers, unsearched(left, calls.computed, lambda own: {f for n in own for f in calls.read.get(n, ())})


@dataclass(frozen=True)
class _Tap:
    """A call of a layer as it ran."""

    layer: int
    call: Call
    output: Tensor


def _recorder(taps: list[_Tap], first: int) -> Callable[[int, Call], Tensor]:
    """Keeps the calls of layers from ``first`` on, whose outputs get gradients where autograd is on."""

    def record(layer: int, call: Call) -> Tensor:
        y = call.of(call.x)
        if layer < first:
            return y
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        taps.append(_Tap(layer, replace(call, args=(call.x.detach().clone(), *call.args[1:])), y))
        return y.clone()  # what follows may write in place

    return record


@dataclass(frozen=True)
class _Place:
    """Where samples are in what enters a layer: in this dimension, outside of which so many positions lie."""

    dim: int
    outer: int

    def sums(self, values: Tensor, samples: int) -> Tensor:
        """``[samples]`` sums."""
        return values.movedim(self.dim, 0).reshape(self.outer, samples, -1).sum((0, 2))


def _place(one: Tensor, other: Tensor, samples: int) -> _Place | None:
    """Found from two inputs of a layer that differ by the first sample alone."""
    differs = one != other
    for dim, size in enumerate(one.shape):
        count, rest = divmod(size, samples)
        for outer in () if rest else [t for t in range(1, count + 1) if count % t == 0]:
            found = differs.movedim(dim, 0).reshape(outer, samples, -1).any(2)
            if found[:, 0].all() and not found[:, 1:].any():
                return _Place(dim, outer)
    return None

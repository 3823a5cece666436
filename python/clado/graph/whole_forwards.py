"""Models that cannot be exported: whole forwards, every stream under its own weights. Same results, no shared prefixes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common import require
from ..quant import Layer, ignored, layer_name, storage
from .executor import gradients
from .forward import ForwardStep, Step, check_eval, generator_states, plain_call
from .moments import Use, used
from .runner import Objective, Runner, Variants
from .streams import close, tensors


@dataclass(frozen=True)
class WholeState:
    """Where a graph's state has live values, this one has the batch, and at the end the outputs.

    Attributes:
        weights: per stream {layer: its perturbed weight}.
    """

    position: int
    batch: Any
    samples: int
    weights: tuple[dict[int, Tensor], ...]
    results: tuple[Any, ...] | None = None

    @property
    def streams(self) -> int:
        return len(self.weights)


class WholeForwards:
    """A :class:`Runner` by whole forwards, with weights swapped by ``functional_call``.

    Attributes:
        layers: Linear and Conv2d modules' weights in the order they first run.
        skipped: layers kept in float, with the reason.
        work: forwards done so far times samples.
    """

    stack: int | None = None
    stacks = False
    kept: tuple[Tensor, ...] = ()
    sample_bytes = None
    forward_share = 1.0

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        ignore: Sequence[str] = (),
        quantize_ends: bool = False,
        forward_step: ForwardStep | None = None,
        note: str | None = None,
    ) -> None:
        check_eval(model)
        self.work, self.note = 0.0, note
        self._device = next(model.parameters()).device
        self._step = Step(model, forward_step or plain_call).eval()
        self._base: dict[str, Tensor] = {}  # clean weights other than the model's, by parameter
        found, modules = self._find_layers(model, example)
        self.skipped = ignored(found, ignore, quantize_ends)
        kept = [k for k, layer in enumerate(found) if layer.name not in self.skipped]
        require(len(kept) > 0, "capture", "model", "have at least one Linear or Conv2d layer to quantize", "none")
        self.layers = tuple(found[k] for k in kept)
        self._modules = [modules[k] for k in kept]

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
        return WholeState(-1, batch, len(pytree.tree_leaves(batch)[0]), ({},))

    def advance(self, state: WholeState, layer: int) -> WholeState:
        """At the end: one forward per stream."""
        if layer == self.num_layers and state.results is None:
            state = replace(
                state, results=tuple(self._forward(state.batch, own, state.samples) for own in state.weights)
            )
        return replace(state, position=2 * layer)

    def fork(self, state: WholeState, layer: int, variants: Sequence[Tensor]) -> WholeState:
        weights = tuple({**own, layer: variant} for variant in variants for own in state.weights)
        return replace(state, position=2 * layer + 1, weights=weights, results=None)

    def outputs(self, state: WholeState) -> list[Any]:
        results = self.advance(state, self.num_layers).results
        assert results is not None
        return list(results)

    def finish(self, state: WholeState) -> Tensor:
        return torch.stack(self.outputs(state))

    def clean(self, state: WholeState) -> Tensor:
        return self.finish(state)[0]

    def changes(self, finished: Tensor, logits: Tensor) -> Tensor:
        return finished.sub_(logits)

    def products(self, state: WholeState, variants: Variants, objective: Objective) -> Tensor:
        """As :meth:`Runner.products`; what each layer's change does to its output is computed per variant."""
        first = state.position // 2
        starts = [0, *itertools.accumulate(len(own) for own in variants[first:])]
        out = torch.zeros(starts[-1], state.streams, state.samples, dtype=torch.float64, device=self._device)
        taps: list[tuple[int, int, nn.Module, Tensor, Tensor]] = []
        results = []
        for stream, own in enumerate(state.weights):

            def record(layer: int, module: nn.Module, x: Tensor, y: Tensor, stream: int = stream) -> Tensor:
                if not y.requires_grad:
                    y.requires_grad_()
                taps.append((stream, layer, module, x.detach().clone(), y))
                return y.clone()  # what follows may write in place

            with torch.enable_grad(), self._watch(range(first, self.num_layers), record):
                results.append(self._forward(state.batch, own, state.samples))
        with torch.enable_grad():
            total = objective(replace(state, position=2 * self.num_layers, results=tuple(results)))
        found = gradients(total, [tap[-1] for tap in taps])
        for (stream, layer, module, x, _), gradient in zip(taps, found, strict=True):
            clean: Any = self._base.get(self.layers[layer].names[0], module.weight)
            if gradient is None:
                continue
            for m, variant in enumerate(variants[layer]):
                change = _apply(module, x, variant - clean)
                value = (change * gradient).reshape(state.samples, -1).sum(1)
                out[starts[layer - first] + m, stream] += value.to("cpu", torch.float64)
        self.work += 2 * state.streams * state.samples
        return out

    def inputs(self, batch: Any, see: Callable[[int, Use, Tensor], None]) -> None:
        def record(layer: int, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            see(layer, *used(module, x))
            return y

        with self._watch(range(self.num_layers), record):
            self._forward(batch, {}, len(pytree.tree_leaves(batch)[0]))

    def rebase(self, weights: Mapping[int, Tensor]) -> None:
        self._base = {**self._base, **self._named(weights)}

    def only(self, layers: Sequence[int]) -> WholeForwards:
        made = copy.copy(self)
        made.layers, made._modules = tuple(self.layers[k] for k in layers), [self._modules[k] for k in layers]
        made.work = 0.0
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
        whole, again = (self._forward(batch, {}, 0) for _ in range(2))
        alone = self._forward(pytree.tree_map(lambda leaf: leaf[:1], batch), {}, 0)
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

    def _named(self, weights: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Every parameter of the layers with its weight."""
        return {name: weight for k, weight in weights.items() for name in self.layers[k].names}

    def _forward(self, batch: Any, own: dict[int, Tensor], samples: int) -> Any:
        self.work += samples
        weights = {f"model.{name}": weight for name, weight in {**self._base, **self._named(own)}.items()}
        before = generator_states(self._device)
        output = torch.func.functional_call(self._step, weights, (batch,)) if weights else self._step(batch)
        drawn = generator_states(self._device) != before  # on these data, where a first forward drew nothing
        require(not drawn, "capture", "model", "draw nothing at random in eval mode (dropout, noise)", "a draw")
        return output

    @contextmanager
    def _watch(self, layers: Sequence[int], record: Any) -> Iterator[None]:
        """Call ``record(layer, module, input, output)`` whenever a layer runs; what it returns is the layer's output."""
        handles = [
            module.register_forward_hook(lambda m, args, output, k=k: record(k, m, args[0], output))
            for k in layers
            for module in self._modules[k]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _find_layers(self, model: nn.Module, example: Any) -> tuple[list[Layer], list[list[nn.Module]]]:
        names: dict[tuple[Any, ...], list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(storage(parameter), []).append(name)
        modules: dict[tuple[Any, ...], list[nn.Module]] = {}
        macs: dict[tuple[Any, ...], int] = {}
        samples = len(pytree.tree_leaves(example)[0])

        def record(module: Any, _: Any, output: Tensor) -> None:
            key = storage(module.weight)
            if module not in modules.setdefault(key, []):
                modules[key].append(module)
            macs[key] = macs.get(key, 0) + output.numel() // samples // module.weight.shape[0] * module.weight.numel()

        every: list[Any] = list(model.modules())
        suited = [m for m in every if type(m) in (nn.Linear, nn.Conv2d) and storage(m.weight) in names]
        handles = [m.register_forward_hook(record) for m in suited]
        try:
            self._step(example)
        finally:
            for handle in handles:
                handle.remove()
        layers = [
            Layer(
                layer_name(names[key][0]),
                "linear" if isinstance(used[0], nn.Linear) else "conv2d",
                tuple(used[0].weight.shape),  # type: ignore[arg-type]
                macs[key],
                tuple(names[key]),
            )
            for key, used in modules.items()
        ]
        return layers, list(modules.values())


def _apply(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a Linear or Conv2d makes of its input under another weight, without bias."""
    if isinstance(module, nn.Conv2d):
        found: Tensor = module._conv_forward(x, weight, None)
        return found
    return torch.nn.functional.linear(x, weight)

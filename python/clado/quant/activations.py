"""Quantized activations: the input of every layer rounded to a per-tensor asymmetric range that a few batches calibrate.

A layer has one range, of least squared error among shrunken ranges over all that enters it: in every call of its weight and in
every batch, whatever their order. (CLADO, arXiv 2307.05657, §4, has a moving average over batches, which clips what comes late.)
Inputs are rounded where a weight is applied, by a module or by a functional call; torch.export takes that into the graph, and
every estimator measures weights under quantized activations.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common import CladoError, require
from .calls import Call, Calls
from .layers import Layer, modules

# Shrink factors tried; elements that are looked at of a call, and of all calls.
STEPS, ELEMENTS, MOST_ELEMENTS = 95, 1 << 16, 1 << 18


@dataclass(frozen=True)
class ActivationRanges:
    """How the inputs of layers are rounded: to 2^bits levels over a range that holds zero.

    Attributes:
        bits: 2..8.
        ranges: {layer: (lowest, highest)}; inputs of other layers stay float.
    """

    bits: int
    ranges: Mapping[str, tuple[float, float]]

    def __post_init__(self) -> None:
        known = type(self.bits) is int and 2 <= self.bits <= 8
        require(known, "activations", "bits", "lie in 2..8", repr(self.bits))
        for name, (low, high) in self.ranges.items():
            sound = math.isfinite(high - low) and low <= 0 <= high
            require(sound, "activations", f"range of {name}", "be finite and hold 0", (low, high))

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "ranges": {name: list(pair) for name, pair in self.ranges.items()}}

    @staticmethod
    def from_json(data: Any) -> ActivationRanges | None:
        """Inverse of :meth:`to_json`; None for the empty object, which stands for inputs that stay float.

        Raises:
            CladoError: anything else.
        """
        if data == {}:
            return None
        try:
            ranges = {name: (float(low), float(high)) for name, (low, high) in data["ranges"].items()}
            return ActivationRanges(data["bits"], ranges)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CladoError):
                raise
            must = "hold bits and a range for each layer"
            raise CladoError(f"activations: file must {must}, got {type(error).__name__}: {error}") from None


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    layers: Sequence[Layer],
    bits: int = 8,
) -> ActivationRanges:
    """Ranges of the inputs of layers.

    Args:
        model: in eval mode; not changed.
        batches: a few of the sensitivity set.
        forward: ``forward(model, batch)``.
        layers: whose inputs are rounded.
        bits: 2..8, codes 0 … 2^bits − 1.

    Returns:
        The ranges by layer, zero inside each.

    Raises:
        CladoError: a layer that the batches do not reach.
    """
    require(isinstance(bits, int) and 2 <= bits <= 8, "profile", "act_bits", "be None or lie in 2..8", bits)
    seen: dict[str, _Seen] = {layer.name: _Seen() for layer in layers}
    known = {name: layer.name for layer in layers for name in layer.names}

    def look(call: Call) -> Tensor:
        seen[known[call.part.name]].add(call.x.detach())
        return call.of(call.x)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    with Calls({name: parameters[name] for name in known}, look):
        for batch in batches:
            forward(model, batch)
    idle = [name for name, values in seen.items() if not values.parts]
    require(not idle, "profile", "act_bits", "round inputs of layers that run", f"none of {', '.join(idle[:3])}")
    return ActivationRanges(bits, {name: best_range(values.pooled, bits) for name, values in seen.items()})


class _Seen:
    """What entered a layer: some elements of every call, and the extremes of all."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1).float()
        some = flat[:: max(1, flat.numel() // ELEMENTS)]
        self.parts.append(torch.cat([some, flat.min()[None], flat.max()[None]]))

    @property
    def pooled(self) -> Tensor:
        """In ascending order, so that the order of calls and batches is forgotten; the extremes are among them."""
        values = torch.cat(self.parts).sort().values
        step = max(1, len(values) // MOST_ELEMENTS)
        return torch.cat([values[::step], values[-1:]])


def best_range(x: Tensor, bits: int) -> tuple[float, float]:
    """(lowest, highest) of least squared rounding error among the tensor's own range and shrunken ones, zero included."""
    flat = x.reshape(-1).float()
    low, high = min(0.0, flat.min().item()), max(0.0, flat.max().item())
    pairs = [(low * (1 - step / 100), high * (1 - step / 100)) for step in range(STEPS)]
    errors = torch.stack([(rounded(flat, *pair, bits) - flat).square().sum() for pair in pairs]).tolist()  # one wait
    return min(zip(errors, pairs, strict=True), key=lambda tried: tried[0])[1]


def rounded(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """``x`` on the 2^bits levels of a range; beyond it the ends. An empty range leaves ``x`` as it is.

    Plain operators, which every torch exports; the gradient passes straight through wherever nothing is clamped.
    """
    levels = 2**bits - 1
    scale = (high - low) / levels
    if scale == 0:
        return x
    zero = min(levels, max(0, round(-low / scale)))
    steps = (x / scale).clamp(-zero, levels - zero)
    found: Tensor = (steps + (steps.round() - steps).detach()) * scale  # the sum is exact: an integer
    return found


def quantize_activations(model: nn.Module, activations: ActivationRanges, layers: Sequence[Layer]) -> nn.Module:
    """A copy of ``model`` that rounds the inputs of its layers to their ranges; parameters and buffers stay the same.

    Where its own forward runs, inputs are rounded as a weight is applied to them. Where a part of it is called by itself, only
    modules that own a weight round what they are given. So do modules that share a weight but have ranges of their own, as older
    files have them.

    Raises:
        CladoError: a range for a layer that is not among ``layers``, or that the model does not have.
    """
    quantized = copy.deepcopy(model)
    every = dict(quantized.named_modules(remove_duplicate=False))
    left, names = dict(activations.ranges), dict[str, tuple[float, float]]()
    rounding = _Rounding(activations.bits, names)
    for layer in layers:
        found = {path: left.pop(path) for path in dict.fromkeys([layer.name, *modules(layer)]) if path in left}
        if not found:
            continue
        pair, *others = set(found.values())
        if not others:
            names |= dict.fromkeys(layer.names, pair)
        for name in layer.names:
            path, _, attribute = name.rpartition(".")
            there = path in every and hasattr(every[path], attribute)
            require(there, "activations", "model", f"have a parameter {name}", "another model")
        for path in modules(layer):
            owner = every.get(path)
            if owner is not None and owner is not quantized and hasattr(owner, "weight"):
                hook = rounding.hook(found.get(path, pair), always=bool(others))
                owner.register_forward_pre_hook(hook, with_kwargs=True)
    require(not left, "activations", "layers", f"hold {next(iter(left), '')}", f"{len(layers)} others")
    quantized.__dict__["_input_rounding"] = rounding
    quantized.__class__ = _rounding_inputs(type(quantized))
    return quantized


class _Rounding:
    """Rounds what weights are applied to.

    Attributes:
        ranges: by parameter.
        active: whether the model's own forward runs.
    """

    def __init__(self, bits: int, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.bits, self.ranges, self.active = bits, ranges, False

    def apply(self, call: Call) -> Tensor:
        pair = self.ranges.get(call.part.name)  # None: of a packed layer whose input stays float
        return call.of(call.x if pair is None else rounded(call.x, *pair, self.bits))

    def hook(self, pair: tuple[float, float], always: bool) -> Callable[[nn.Module, Any, Any], Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.active and not always:
                return None
            if args:
                return (rounded(args[0], *pair, self.bits), *args[1:]), kwargs
            first = next(iter(kwargs), None)
            return args, {k: rounded(v, *pair, self.bits) if k == first else v for k, v in kwargs.items()}

        return before


def _rounding_inputs(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class whose forward, of the same signature, rounds inputs where weights are applied."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        rounding: _Rounding = self._input_rounding
        parameters = dict(self.named_parameters(remove_duplicate=False))
        before, rounding.active = rounding.active, True
        try:
            plain = {
                name: parameters[name] for name in rounding.ranges if name in parameters
            }  # packed ones announce themselves
            with Calls(plain, rounding.apply):
                return kind.forward(self, *args, **kwargs)
        finally:
            rounding.active = before

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})

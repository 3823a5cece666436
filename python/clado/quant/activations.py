"""Where the inputs of layers are rounded, and the ranges that a few batches calibrate.

A layer has one range per input format, over all that enters it: in every call of its weight and in every batch, whatever their
order; for integers it is the one of least squared error among shrunken ones. (CLADO, arXiv 2307.05657, §4, has a moving average
over batches, which clips what comes late.) Inputs are rounded where a weight is applied, by a module or by a functional call;
torch.export takes that into the graph.
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
from .candidates import Candidates, Scheme
from .inputs import INPUTS, InputRounding, Pair, StaticInteger, known_input
from .layers import Layer, modules

# Elements that are looked at of a call, and of all calls.
ELEMENTS, MOST_ELEMENTS = 1 << 16, 1 << 18


@dataclass(frozen=True)
class ActivationRanges:
    """Ranges of layers' inputs, zero inside each.

    Attributes:
        formats: {input format: {layer: (lowest, highest)}}.
        base: whether the float model that a matrix is around rounds these inputs already, in one integer format (``act_bits``);
            else each candidate rounds its own as its scheme says.
    """

    formats: Mapping[str, Mapping[str, Pair]]
    base: bool = False

    def __post_init__(self) -> None:
        for name, ranges in self.formats.items():
            ranged = known_input(name).ranged
            require(ranged, "activations", "formats", "be ones that need ranges", name)
            for layer, (low, high) in ranges.items():
                sound = math.isfinite(high - low) and low <= 0 <= high
                require(sound, "activations", f"range of {layer}", "be finite and hold 0", (low, high))
        must = "hold one integer format where the base is rounded"
        require(
            not self.base or len(self._integers) == len(self.formats) == 1,
            "activations",
            "formats",
            must,
            [*self.formats],
        )

    @staticmethod
    def of_width(bits: int, ranges: Mapping[str, Pair], base: bool = True) -> ActivationRanges:
        """All inputs to so many bits, 2..8."""
        known = type(bits) is int and 2 <= bits <= 8
        require(known, "activations", "bits", "lie in 2..8", repr(bits))
        return ActivationRanges({f"int{bits}": ranges}, base)

    @property
    def _integers(self) -> list[int]:
        return [INPUTS[name].bits for name in self.formats if isinstance(INPUTS[name], StaticInteger)]

    @property
    def bits(self) -> int:
        """Of the only format, an integer one.

        Raises:
            CladoError: there are others.
        """
        only = len(self._integers) == len(self.formats) == 1
        require(only, "activations", "formats", "be one integer format", ", ".join(self.formats) or "none")
        return self._integers[0]

    @property
    def ranges(self) -> Mapping[str, Pair]:
        """{layer: (lowest, highest)} of the only format; errors as :attr:`bits`."""
        return self.formats[f"int{self.bits}"]

    def of(self, layer: str, input: str) -> Pair | None:
        """The range of a layer's input in a format."""
        return self.formats.get(input, {}).get(layer)

    def chosen(self, schemes: Mapping[str, Scheme]) -> ActivationRanges | None:
        """Those that a scheme per layer needs; None: none."""
        if self.base:
            return self
        kept: dict[str, dict[str, Pair]] = {}
        for layer, scheme in schemes.items():
            pair = self.of(layer, scheme.input)
            if pair is not None:
                kept.setdefault(scheme.input, {})[layer] = pair
        return ActivationRanges(kept) if kept else None

    def to_json(self) -> dict[str, Any]:
        if self.base:
            return {"bits": self.bits, "ranges": _listed(self.ranges)}
        return {"formats": {name: _listed(ranges) for name, ranges in self.formats.items()}}

    @staticmethod
    def from_json(data: Any) -> ActivationRanges | None:
        """Inverse of :meth:`to_json`; None for the empty object, which stands for inputs that stay float.

        Raises:
            CladoError: anything else.
        """
        if data == {}:
            return None
        try:
            if "formats" in data:
                return ActivationRanges({name: _paired(ranges) for name, ranges in data["formats"].items()})
            return ActivationRanges.of_width(data["bits"], _paired(data["ranges"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CladoError):
                raise
            must = "hold bits and a range for each layer"
            raise CladoError(f"activations: file must {must}, got {type(error).__name__}: {error}") from None


def _listed(ranges: Mapping[str, Pair]) -> dict[str, list[float]]:
    return {name: list(pair) for name, pair in ranges.items()}


def _paired(ranges: Any) -> dict[str, Pair]:
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def input_rounding(layer: Layer, scheme: Scheme, activations: ActivationRanges | None) -> InputRounding | None:
    """How a scheme rounds a layer's input; None where it stays as it is, or the base rounds it already.

    Raises:
        CladoError: a range that is needed and not there.
    """
    if not scheme.input or (activations is not None and activations.base):
        return None
    pair = None if activations is None else activations.of(layer.name, scheme.input)
    return InputRounding(scheme.input, pair, layer.kind)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    layers: Sequence[Layer],
    bits: int = 8,
) -> ActivationRanges:
    """Ranges of the inputs of layers, for a base that rounds them all.

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
    same = Candidates.uniform(layers, [Scheme.of(8, bits)])
    return ActivationRanges(calibrate_inputs(model, batches, forward, same, "act_bits").formats, base=True)


def calibrate_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    candidates: Candidates,
    argument: str = "schemes",
) -> ActivationRanges:
    """Ranges that candidates need, and proof that the input of every layer that is rounded can be intercepted.

    Args:
        model, batches, forward: as for :func:`calibrate`.
        candidates: layers and schemes.
        argument: what asks for it.

    Raises:
        CladoError: a layer whose weight no call of the model's forward is seen to apply.
    """
    wanted = {
        layer.name: list(dict.fromkeys(scheme.input for scheme in schemes if scheme.input))
        for layer, schemes in zip(candidates.layers, candidates.schemes, strict=True)
    }
    seen = {name: _Seen() for name, formats in wanted.items() if formats}
    known = {name: layer.name for layer in candidates.layers if layer.name in seen for name in layer.names}

    def look(call: Call) -> Tensor:
        seen[known[call.part.name]].add(call.x.detach())
        return call.of(call.x)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    with Calls({name: parameters[name] for name in known}, look):
        for batch in batches:
            forward(model, batch)
    idle = [name for name, values in seen.items() if not values.parts]
    require(not idle, "profile", argument, "round inputs of layers that run", f"none of {', '.join(idle[:3])}")
    formats: dict[str, dict[str, Pair]] = {}
    for layer, values in seen.items():
        ranged = [name for name in wanted[layer] if INPUTS[name].ranged]
        pooled = values.pooled if ranged else None
        for name in ranged:
            assert pooled is not None
            formats.setdefault(name, {})[layer] = INPUTS[name].range_of(pooled)
    return ActivationRanges(formats)


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


def quantize_activations(model: nn.Module, activations: ActivationRanges, layers: Sequence[Layer]) -> nn.Module:
    """A copy of ``model`` that rounds the inputs of all layers that have a range; the model that ``act_bits`` is measured around.

    Args, errors: as :func:`round_inputs`.
    """
    input = f"int{activations.bits}"
    kinds = {path: layer.kind for layer in layers for path in (layer.name, *modules(layer))}
    found = {path: InputRounding(input, pair, kinds.get(path, "linear")) for path, pair in activations.ranges.items()}
    return round_inputs(model, found, layers)


def with_rounded_inputs(
    model: nn.Module, layers: Sequence[Layer], schemes: Mapping[str, Scheme], activations: ActivationRanges | None
) -> nn.Module:
    """``model`` with inputs rounded as a scheme per layer says, in a copy; itself where all of them stay as they are.

    Raises:
        CladoError: a range that is needed and not there.
    """
    if activations is not None and activations.base:
        return quantize_activations(model, activations, layers)
    roundings = {layer.name: input_rounding(layer, schemes[layer.name], activations) for layer in layers}
    found = {name: rounding for name, rounding in roundings.items() if rounding is not None}
    return round_inputs(model, found, layers) if found else model


def round_inputs(model: nn.Module, roundings: Mapping[str, InputRounding], layers: Sequence[Layer]) -> nn.Module:
    """A copy of ``model`` that rounds the inputs of its layers; parameters and buffers stay the same.

    Where its own forward runs, inputs are rounded as a weight is applied to them. Where a part of it is called by itself, only
    modules that own a weight round what they are given. So do modules that share a weight but have ranges of their own, as older
    files have them.

    Args:
        roundings: by layer.

    Raises:
        CladoError: a rounding for a layer that is not among ``layers``, or that the model does not have.
    """
    quantized = copy.deepcopy(model)
    every = dict(quantized.named_modules(remove_duplicate=False))
    left, names = dict(roundings), dict[str, InputRounding]()
    rounding = _Rounding(names)
    for layer in layers:
        found = {path: left.pop(path) for path in dict.fromkeys([layer.name, *modules(layer)]) if path in left}
        if not found:
            continue
        own, *others = set(found.values())
        if not others:
            names |= dict.fromkeys(layer.names, own)
        for name in layer.names:
            path, _, attribute = name.rpartition(".")
            there = path in every and hasattr(every[path], attribute)
            require(there, "activations", "model", f"have a parameter {name}", "another model")
        for path in modules(layer):
            owner = every.get(path)
            if owner is not None and owner is not quantized and hasattr(owner, "weight"):
                hook = rounding.hook(found.get(path, own), always=bool(others))
                owner.register_forward_pre_hook(hook, with_kwargs=True)
    require(not left, "activations", "layers", f"hold {next(iter(left), '')}", f"{len(layers)} others")
    quantized.__dict__["_input_rounding"] = rounding
    quantized.__class__ = _rounding_inputs(type(quantized))
    return quantized


class _Rounding:
    """Rounds what weights are applied to.

    Attributes:
        roundings: by parameter.
        active: whether the model's own forward runs.
    """

    def __init__(self, roundings: Mapping[str, InputRounding]) -> None:
        self.roundings, self.active = roundings, False

    def apply(self, call: Call) -> Tensor:
        rounding = self.roundings.get(call.part.name)  # None: of a packed layer whose input stays float
        return call.of(call.x if rounding is None else rounding(call.x))

    def hook(self, rounding: InputRounding, always: bool) -> Callable[[nn.Module, Any, Any], Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.active and not always:
                return None
            if args:
                return (rounding(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs), None)
            return args, {k: rounding(v) if k == first else v for k, v in kwargs.items()}

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
                name: parameters[name] for name in rounding.roundings if name in parameters
            }  # packed ones announce themselves
            with Calls(plain, rounding.apply):
                return kind.forward(self, *args, **kwargs)
        finally:
            rounding.active = before

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})

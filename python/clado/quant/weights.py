"""The calls that quantize the weights of a model: ``variants`` for what is measured, ``codes`` for what ships.

Under nearest rounding both search a scale once per weight and format in a process: scales are kept by the content of the weight.
Under any other both hand out what ``round_weights`` made once.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common import require, tensor_digest, weights_digest
from .activations import ActivationRanges, input_rounding
from .candidates import Candidates, Scheme
from .factors import Factors, factored, layer_loss
from .inputs import Variant
from .layers import Layer
from .numbers import Number, Quantized, all_nearest, all_scales
from .quantizer import Quantizer
from .rounded import Rounded
from .rounding import ROUNDINGS
from .scaling import Scales

Moments = Mapping[str, Tensor]  # {layer: [G, inputs, inputs]}
_KEPT_BYTES = 256 << 20  # of scales: a thousand million weights in groups of 64 take as much at four widths


class Choice(Protocol):
    """What :func:`codes` reads of a plan."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def chosen(self) -> Mapping[str, Scheme]: ...

    @property
    def quantizer(self) -> Quantizer: ...

    @property
    def rounded(self) -> Rounded | None: ...


def variants(
    model: nn.Module,
    candidates: Candidates,
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
    rounded: Rounded | None = None,
    activations: ActivationRanges | None = None,
) -> list[list[Variant]]:
    """For every layer its weight, output channels first, under each of its candidates: quantized in its own dtype, converted; and
    how its input is rounded.

    Args:
        model: holds the weights; not changed.
        candidates: the layers and their schemes.
        quantizer: settings of the quantization.
        device, dtype: of the result.
        rounded: the weights as :func:`round_weights` made them; None: nearest rounding.
        activations: ranges of the inputs; those of a base that rounds its inputs already round no more.

    Raises:
        CladoError: a width without a format, rounded weights that lack a candidate, or a range that is needed and not there.
    """
    found = []
    weights = _Weight.of(model, candidates.layers, quantizer, rounded)
    for layer, weight, schemes in zip(candidates.layers, weights, candidates.schemes, strict=True):
        numbers = {scheme.weight: scheme.number for scheme in schemes}
        made = zip(numbers, weight.values(list(numbers.values())), strict=True)
        values = {name: value.to(device, dtype) for name, value in made}
        rounds = [input_rounding(layer, scheme, activations) for scheme in schemes]
        found.append([Variant(values[own.weight], how) for own, how in zip(schemes, rounds, strict=True)])
    return found


def codes(model: nn.Module, plan: Choice) -> dict[str, Quantized]:
    """{layer: its weight as the plan has it, output channels first}. What is packed, written, timed or applied is this.

    Args, errors: as :func:`variants`; ``plan`` names layers, widths, settings and rounded weights.
    """
    weights = _Weight.of(model, plan.layers, plan.quantizer, plan.rounded)
    return {weight.name: weight.codes(plan.chosen[weight.name].number) for weight in weights}


def round_weights(
    model: nn.Module,
    candidates: Candidates,
    quantizer: Quantizer,
    rounding: str,
    moments: Moments,
    sample_digests: Tensor,
    done: Callable[[], None] = lambda: None,
) -> Rounded:
    """All candidates' weights by a rounding that needs moments: one factorization of a layer serves all its formats.

    Args:
        model: holds the weights; not changed.
        candidates: the layers and their schemes.
        quantizer: settings of the quantization.
        rounding: one of ``ROUNDINGS`` that needs moments.
        moments: second moments of the layers' inputs, ``[G, K, K]`` each.
        sample_digests: of the samples that they are of.
        done: called after every layer.

    Raises:
        CladoError: an unknown rounding; moments that are missing, not finite or of another layer.
    """
    known = [name for name, rounding_ in ROUNDINGS.items() if rounding_.needs_moments]
    require(rounding in known, "round", "rounding", f"be one of {', '.join(known)}", repr(rounding))
    packed: dict[tuple[str, str], dict[str, Tensor]] = {}
    damped: dict[str, float] = {}
    dead: dict[str, int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer, schemes in zip(candidates.layers, candidates.schemes, strict=True):
        name, weight = layer.name, layer.weight(parameters).detach()
        require(name in moments, "round", "moments", f"be there for {name} and {rounding} rounding", "none")
        own, inputs = moments[name], math.prod(layer.shape[1:])
        fits = own.dim() == 3 and own.shape[1:] == (inputs, inputs) and layer.shape[0] % len(own) == 0
        require(fits, "round", "moments", f"be [G, {inputs}, {inputs}] for {name}", tuple(own.shape))
        numbers = list(dict.fromkeys(scheme.number for scheme in schemes))
        found, factors = _by_moments(rounding, weight, numbers, quantizer, own, name)
        for number, held in zip(numbers, found, strict=True):
            packed[name, number.name] = held.cpu().packed()
        damped[name] = factors.damping
        dead |= {name: factors.dead} if factors.dead else {}
        done()
    shapes = {layer.name: layer.shape for layer in candidates.layers}
    return Rounded(rounding, weights_digest(model), quantizer, shapes, packed, sample_digests, damped=damped, dead=dead)


def optimism(model: nn.Module, candidates: Candidates, *halves: tuple[Moments, Rounded]) -> dict[str, dict[str, float]]:
    """{layer: {format: by how much larger the layer loss tr(E H Eᵀ) is on samples that had no part in the rounding}}, at least 1.

    By cross-validation: the weights by each half of the samples on the moments of the other. The logarithm of that ratio falls as
    1/n, as for p numbers that are fitted by least squares, log (1 + p/n) / (1 − p/n) ≈ 2p/n, so that of all samples it is half of
    what it is of a half: a square root.

    Args:
        model: the float weights; candidates: whose.
        halves: of two disjoint sets of samples the moments, and the weights that they round.
    """
    found: dict[str, dict[str, float]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer, schemes in zip(candidates.layers, candidates.schemes, strict=True):
        weight, numbers = layer.weight(parameters).detach(), {scheme.number for scheme in schemes}
        found[layer.name] = {}
        for number in sorted(numbers, key=lambda number: number.name):
            rounded = torch.stack([by.of(layer.name, number).values(torch.float32) for _, by in halves])
            moments = [own[layer.name].to(weight.device, torch.float32) for own, _ in halves]
            errors = (weight.float() - rounded.to(weight.device)).reshape(2, -1, moments[0].shape[-1])
            (one, other), (another, two) = (layer_loss(errors, own).sum(1).tolist() for own in moments)
            own, others = one + two, other + another
            found[layer.name][number.name] = max(1.0, others / own) ** 0.5 if own > 0 else 1.0
    return found


def compensated(
    weight: Tensor, number: Number, quantizer: Quantizer, moments: Tensor, layer: str = "a layer"
) -> Quantized:
    """One weight by compensated rounding, for moments ``[G, K, K]`` of its input; errors as :func:`round_weights`."""
    return _by_moments("compensated", weight, [number], quantizer, moments, layer)[0][0]


def _by_moments(
    rounding: str, weight: Tensor, numbers: Sequence[Number], quantizer: Quantizer, moments: Tensor, layer: str
) -> tuple[list[Quantized], Factors]:
    """One weight in several formats, where its moments lie, and the factors that served them all."""
    factors = factored(moments, layer)
    matrix = quantizer.matrix(weight).to(moments.device)
    found = ROUNDINGS[rounding].rounded(matrix, numbers, quantizer, factors)
    shape = tuple(weight.shape)
    return [Quantized(number, shape, *coded) for number, coded in zip(numbers, found, strict=True)], factors


class _Weight:
    """A layer's weight under the settings of a run."""

    def __init__(self, name: str, weight: Tensor, quantizer: Quantizer, rounded: Rounded | None) -> None:
        self.name, self.weight, self.quantizer, self.rounded = name, weight, quantizer, rounded
        self.matrix = quantizer.matrix(weight)

    @staticmethod
    def of(
        model: nn.Module, layers: Sequence[Layer], quantizer: Quantizer, rounded: Rounded | None
    ) -> Iterator[_Weight]:
        """One after the other, so that no second copy of all of them is ever there."""
        same = rounded is None or rounded.quantizer == quantizer
        require(same, "quantize", "rounded weights", f"be made with {quantizer}", rounded and rounded.quantizer)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for layer in layers:
            yield _Weight(layer.name, layer.weight(parameters).detach(), quantizer, rounded)

    @cached_property
    def digest(self) -> str:
        return tensor_digest({"": self.matrix})

    def values(self, numbers: Sequence[Number]) -> list[Tensor]:
        if self.rounded is not None:
            return [self.codes(number).values(self.weight.dtype) for number in numbers]
        values = all_nearest(numbers, self.matrix, self.scales(numbers))
        return [value.view(self.weight.shape).to(self.weight.dtype) for value in values]

    def codes(self, number: Number) -> Quantized:
        if self.rounded is not None:
            return self.rounded.of(self.name, number).to(self.weight.device)
        scales = self.scales([number])[0]
        return Quantized(number, tuple(self.weight.shape), number.encode(self.matrix, scales), scales)

    def scales(self, numbers: Sequence[Number]) -> list[Scales]:
        """Those that are kept; the others are searched together."""
        device = self.matrix.device
        held = {n.name: _SCALES.get((self.digest, self.quantizer, n.name), device) for n in numbers}
        missing = [number for number in numbers if held[number.name] is None]
        for number, searched in zip(missing, all_scales(missing, self.matrix, self.quantizer), strict=True):
            held[number.name] = searched
            _SCALES.put((self.digest, self.quantizer, number.name), searched)
        return [found for number in numbers if (found := held[number.name]) is not None]


class _Kept:
    """Scales by key, on the CPU and for themselves alone; where they take more than ``limit`` bytes the least used go."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._held: OrderedDict[Any, Scales] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Any, device: torch.device) -> Scales | None:
        """A copy on a device, which the caller may change."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
        return None if found is None else found.to(device, copy=True)

    def put(self, key: Any, scales: Scales) -> None:
        mine = scales.to(torch.device("cpu"), copy=True)
        with self._lock:
            before = self._held.pop(key, None)
            self._held[key] = mine
            self.nbytes += mine.nbytes - (0 if before is None else before.nbytes)
            while self.nbytes > self.limit:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes


_SCALES = _Kept(_KEPT_BYTES)

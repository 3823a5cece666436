"""The two calls that quantize the weights of a model: ``variants`` for what is measured, ``codes`` for what ships.

Both search a scale once per weight and format in a process: scales are kept by the content of the weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common import require, tensor_digest
from .candidates import Candidates, Scheme
from .layers import Layer
from .numbers import Number, Quantized, Scales, all_scales
from .quantizer import Quantizer
from .rounding import ROUNDINGS, Rounding

Moments = Mapping[str, Tensor]  # {layer: [inputs, inputs]}
_KEPT_BYTES = 256 << 20  # of scales: a thousand million weights in groups of 64 take as much at four widths


class Choice(Protocol):
    """What :func:`codes` reads of a plan."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def chosen(self) -> Mapping[str, Scheme]: ...

    @property
    def quantizer(self) -> Quantizer: ...


def variants(
    model: nn.Module,
    candidates: Candidates,
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
    rounding: str = "nearest",
    moments: Moments | None = None,
) -> list[list[Tensor]]:
    """For every layer its weight as each of its candidates has it, quantized in the weight's own dtype, then converted.

    Args:
        model: holds the weights; not changed.
        candidates: the layers and their schemes.
        quantizer: settings of the quantization.
        device, dtype: of the result.
        rounding: one of ``ROUNDINGS``.
        moments: second moments of the layers' inputs, for a rounding that needs them.

    Raises:
        CladoError: a width without a format, an unknown rounding, or no moments where they are needed.
    """
    weights = _Weight.of(model, candidates.layers, quantizer, rounding, moments)
    return [
        [value.to(device, dtype) for value in weight.values([scheme.number for scheme in schemes])]
        for weight, schemes in zip(weights, candidates.schemes, strict=True)
    ]


def codes(
    model: nn.Module, plan: Choice, rounding: str = "nearest", moments: Moments | None = None
) -> dict[str, Quantized]:
    """{layer: its weight as the plan has it}, on the weight's device. What is packed, written, timed or applied is this.

    Args, errors: as :func:`variants`; ``plan`` names layers, widths and settings.
    """
    weights = _Weight.of(model, plan.layers, plan.quantizer, rounding, moments)
    return {weight.name: weight.codes(plan.chosen[weight.name].number) for weight in weights}


class _Weight:
    """A layer's weight under the settings of a run."""

    def __init__(self, name: str, weight: Tensor, quantizer: Quantizer, rounding: Rounding, moments: Tensor | None):
        self.name, self.weight, self.quantizer, self.rounding, self.moments = name, weight, quantizer, rounding, moments
        self.matrix = quantizer.matrix(weight)
        self.digest = tensor_digest({"": self.matrix})

    @staticmethod
    def of(
        model: nn.Module, layers: Sequence[Layer], quantizer: Quantizer, rounding: str, moments: Moments | None
    ) -> Iterator[_Weight]:
        """One after the other, so that no second copy of all of them is ever there."""
        require(rounding in ROUNDINGS, "quantize", "rounding", f"be one of {', '.join(ROUNDINGS)}", repr(rounding))
        rounder, known = ROUNDINGS[rounding], moments or {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for layer in layers:
            there = not rounder.needs_moments or layer.name in known
            require(there, "quantize", "moments", f"be there for {layer.name} and {rounding} rounding", "none")
            yield _Weight(layer.name, parameters[layer.names[0]].detach(), quantizer, rounder, known.get(layer.name))

    def values(self, numbers: Sequence[Number]) -> list[Tensor]:
        values = self.rounding.values(self.matrix, numbers, self.scales(numbers), self.moments)
        return [value.view(self.weight.shape).to(self.weight.dtype) for value in values]

    def codes(self, number: Number) -> Quantized:
        scales = self.scales([number])
        found = self.rounding.codes(self.matrix, [number], scales, self.moments)
        return Quantized(number, tuple(self.weight.shape), found[0], scales[0])

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
        return None if found is None else _copied(found, device)

    def put(self, key: Any, scales: Scales) -> None:
        mine = _copied(scales, torch.device("cpu"))
        with self._lock:
            before = self._held.pop(key, None)
            self._held[key] = mine
            self.nbytes += _nbytes(mine) - (0 if before is None else _nbytes(before))
            while self.nbytes > self.limit:
                self.nbytes -= _nbytes(self._held.popitem(last=False)[1])


def _copied(scales: Scales, device: torch.device) -> Scales:
    zero_point = None if scales.zero_point is None else scales.zero_point.to(device, copy=True)
    return scales._replace(scale=scales.scale.to(device, copy=True), zero_point=zero_point)


def _nbytes(scales: Scales) -> int:
    return scales.scale.nbytes + (0 if scales.zero_point is None else scales.zero_point.nbytes)


_SCALES = _Kept(_KEPT_BYTES)

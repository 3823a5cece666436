"""Quantized activations: the input of every layer rounded to a per-tensor asymmetric range that a few batches calibrate.

The range of a batch is the one of least squared error among shrunken ranges; over batches it is an exponential moving average
(the setting of CLADO, arXiv 2307.05657, §4). The hooks that round are part of the forward, so torch.export takes them into the
graph and every estimator measures weights under quantized activations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common import CladoError, require
from .layers import Layer, ignored

# Share of the old range in the moving average, shrink factors tried, elements of a tensor that are looked at.
MOMENTUM, STEPS, ELEMENTS = 0.9, 95, 1 << 16


@dataclass(frozen=True)
class ActivationRanges:
    """How the inputs of layers are rounded: to 2^bits levels over a range that holds zero.

    Attributes:
        bits: 2..8.
        ranges: {module: (lowest, highest)}; inputs of other modules stay float.
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
    bits: int = 8,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
) -> ActivationRanges:
    """Ranges of the inputs of all Linear and Conv2d modules that run.

    Args:
        model: in eval mode; not changed.
        batches: a few of the sensitivity set, one step of the moving average each.
        forward: ``forward(model, batch)``.
        bits: 2..8, codes 0 … 2^bits − 1.
        ignore, quantize_ends: layers whose inputs stay float, as for the weights.

    Returns:
        The ranges by module, zero inside each.
    """
    require(isinstance(bits, int) and 2 <= bits <= 8, "profile", "act_bits", "be None or lie in 2..8", bits)
    ranges: dict[str, tuple[float, float]] = {}
    kinds: dict[str, Layer] = {}

    def look(name: str, module: Any) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
            kinds.setdefault(name, Layer(name, kind, tuple(module.weight.shape), 0))
            low, high = best_range(inputs[0].detach(), bits)
            old = ranges.get(name, (low, high))
            ranges[name] = tuple(MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(old, (low, high), strict=True))  # type: ignore[assignment]

        return hook

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [module.register_forward_pre_hook(look(name, module)) for name, module in layers]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    keep = ignored(list(kinds.values()), ignore, quantize_ends)
    return ActivationRanges(bits, {name: pair for name, pair in ranges.items() if name not in keep})


def best_range(x: Tensor, bits: int) -> tuple[float, float]:
    """(lowest, highest) of least squared rounding error among the tensor's own range and shrunken ones, zero included."""
    flat = x.reshape(-1).float()
    flat = flat[:: max(1, flat.numel() // ELEMENTS)]
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


def quantize_activations(model: nn.Module, activations: ActivationRanges) -> nn.Module:
    """A copy of ``model`` that rounds the inputs of its layers to their ranges; parameters and buffers stay the same.

    Raises:
        CladoError: a range for a module that the model does not have.
    """
    quantized = copy.deepcopy(model)
    modules = dict(quantized.named_modules())
    for name, (low, high) in activations.ranges.items():
        require(name in modules, "activations", "model", f"have a module {name}", "another model")
        modules[name].register_forward_pre_hook(_rounding(low, high, activations.bits))
    return quantized


def _rounding(low: float, high: float, bits: int) -> Callable[[nn.Module, Any], Any]:
    def hook(_: nn.Module, inputs: Any) -> Any:
        return (rounded(inputs[0], low, high, bits), *inputs[1:])

    return hook

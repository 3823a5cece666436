"""Quantized activations: the input of every layer rounded to a per-tensor asymmetric range that a few batches calibrate.

The range of a batch is the one of least squared error among shrunken ranges; over batches it is an exponential moving average
(the setting of CLADO, arXiv 2307.05657, §4). The hooks that round are part of the forward, so torch.export takes them into the
graph and every estimator measures weights under quantized activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common import require
from .layers import Layer, ignored

# Share of the old range in the moving average, shrink factors tried, elements of a tensor that are looked at.
MOMENTUM, STEPS, ELEMENTS = 0.9, 95, 1 << 16
Activations = dict[str, Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    bits: int = 8,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
) -> Activations:
    """Ranges of the inputs of all Linear and Conv2d modules that run.

    Args:
        model: in eval mode; not changed.
        batches: a few of the sensitivity set, one step of the moving average each.
        forward: ``forward(model, batch)``.
        bits: 2..8, codes 0 … 2^bits − 1.
        ignore, quantize_ends: layers whose inputs stay float, as for the weights.

    Returns:
        {"bits": bits, "ranges": {module name: [lowest, highest]}}, zero inside every range.
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
    return {"bits": bits, "ranges": {name: list(pair) for name, pair in ranges.items() if name not in keep}}


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
    return (steps + (steps.round() - steps).detach()) * scale  # the sum is exact: an integer


def quantize_activations(model: nn.Module, activations: Mapping[str, Any]) -> nn.Module:
    """A copy of ``model`` that rounds the inputs of its layers to their ranges; parameters and buffers stay the same.

    Raises:
        CladoError: a range for a module that the model does not have.
    """
    quantized = copy.deepcopy(model)
    modules = dict(quantized.named_modules())
    for name, (low, high) in activations["ranges"].items():
        require(name in modules, "activations", "model", f"have a module {name}", "another model")
        modules[name].register_forward_pre_hook(_rounding(low, high, activations["bits"]))
    return quantized


def _rounding(low: float, high: float, bits: int) -> Callable[[nn.Module, Any], Any]:
    def hook(_: nn.Module, inputs: Any) -> Any:
        return (rounded(inputs[0], low, high, bits), *inputs[1:])

    return hook

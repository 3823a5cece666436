"""A plan as the configuration of another tool, which then quantizes the model itself: bits per module, no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..artifacts import Plan
from ..common import CladoError, require
from ..quant import Layer, modules


def plain(plan: Plan) -> dict[str, Any]:
    """``{"bits": {module: bits}, "group_size": g, "symmetric": s}``, for tools of one's own; ``"schemes": {module: label}`` too
    where inputs are rounded. Recipes of other tools are of weights alone.

    Raises:
        CladoError: a plan without bits; so do all functions here.
    """
    quantizer = plan.quantizer
    bits = {module: plan.bits[layer.name] for layer in _layers(plan) for module in modules(layer)}
    found = {"bits": bits, "group_size": quantizer.group_size, "symmetric": quantizer.symmetric}
    if any(scheme.input for scheme in plan.chosen.values()):
        found["schemes"] = {m: plan.schemes[layer.name] for layer in plan.layers for m in modules(layer)}
    return found


def torchao(plan: Plan) -> Any:
    """A ``FqnToConfig`` for ``torchao.quantization.quantize_(model, config, filter_fn=None)``, every width from 2 to 8.

    Groups that do not divide a row become their greatest common divisor with it; a scale per tensor becomes one per channel.

    Raises:
        CladoError: torchao is not installed.
    """
    try:
        import torch
        from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
    except ImportError as error:
        raise CladoError(f"recipe: torchao ≥ 0.15 must be installed, got {error}") from None
    kind = MappingType.SYMMETRIC if plan.quantizer.symmetric else MappingType.ASYMMETRIC
    configs: dict[str, Any] = {}
    for layer in _layers(plan):
        group = _group(plan, layer)
        spread = PerAxis(0) if group is None else PerGroup(group)
        dtype = getattr(torch, f"int{plan.bits[layer.name]}")
        config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=spread, mapping_type=kind)
        configs |= dict.fromkeys(modules(layer), config)
    return FqnToConfig(configs)


def torchao_json(plan: Plan) -> dict[str, Any]:
    """:func:`torchao` as JSON; ``torchao.core.config.config_from_dict`` reads it."""
    config = torchao(plan)
    from torchao.core.config import config_to_dict

    written: dict[str, Any] = config_to_dict(config)
    return written


def modelopt(plan: Plan) -> dict[str, Any]:
    """A config for NVIDIA ModelOpt's ``modelopt.torch.quantization.quantize`` (0.47): weights of the planned layers alone.

    ModelOpt's integers are symmetric; an asymmetric plan keeps its widths.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in _layers(plan):
        group = _group(plan, layer) if layer.kind == "linear" else None
        spread: dict[str, Any] = {"axis": 0} if group is None else {"block_sizes": {-1: group, "type": "static"}}
        for module in modules(layer):
            cfg = {"num_bits": plan.bits[layer.name], **spread}
            entries.append({"quantizer_name": f"{module}.weight_quantizer", "cfg": cfg})
    return {"quant_cfg": entries, "algorithm": "max"}


def quanto(plan: Plan) -> list[dict[str, Any]]:
    """Keyword arguments for one ``optimum.quanto.quantize``, one call per width, then ``freeze(model)``.

    Raises:
        CladoError: widths other than 2, 4 and 8: quanto has no others.
    """
    named: dict[int, list[str]] = {}
    for layer in _layers(plan):
        named.setdefault(plan.bits[layer.name], []).extend(modules(layer))
    odd = sorted(set(named) - {2, 4, 8})
    require(not odd, "recipe", "plan", "keep to 2, 4 and 8 bits for quanto", f"{', '.join(map(str, odd))} bits")
    return [{"weights": f"qint{bits}", "include": names} for bits, names in sorted(named.items())]


def _layers(plan: Plan) -> tuple[Layer, ...]:
    require(bool(plan.bits), "recipe", "plan", "hold bits for every layer", f"a plan that is {plan.status}")
    plan.check_integers("recipe", "recipes")
    return plan.layers


def _group(plan: Plan, layer: Layer) -> int | None:
    """Inputs per scale where one channel has several; None for one scale per channel."""
    size, columns = plan.quantizer.group_size, layer.shape[1] if len(layer.shape) > 1 else 1
    return math.gcd(size, columns) if 0 < size < columns else None


# What `clado recipe` writes.
RECIPES: dict[str, Callable[[Plan], Any]] = {
    "json": plain,
    "modelopt": modelopt,
    "quanto": quanto,
    "torchao": torchao_json,
}

"""A plan as the configuration of another tool, which then quantizes the model itself: a scheme per module, no weights.

What a tool has no word for is refused, with the layers. Ranges of inputs are the tool's own: it calibrates what is static.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..artifacts import Plan
from ..common import CladoError, require, some
from ..quant import Integer, Kept, Layer, all_plain, modules


def plain(plan: Plan) -> dict[str, Any]:
    """``{"bits": {module: bits}, "group_size": g, "symmetric": s}``, for tools of one's own; ``"schemes": {module: label}`` too
    where bits of integers do not say it all.

    Raises:
        CladoError: a plan without bits; so do all functions here.
    """
    quantizer = plan.quantizer
    bits = {module: plan.bits[layer.name] for layer in _layers(plan) for module in modules(layer)}
    found = {"bits": bits, "group_size": quantizer.group_size, "symmetric": quantizer.symmetric}
    if not all_plain(plan.chosen.values()):
        found["schemes"] = {m: plan.schemes[layer.name] for layer in plan.layers for m in modules(layer)}
    return found


def torchao(plan: Plan) -> Any:
    """A ``FqnToConfig`` for ``torchao.quantization.quantize_(model, config, filter_fn=None)``.

    Integers of 2 to 8 bits, alone or with 8-bit inputs per token (``A8_DYNAMIC``; torchao's are asymmetric but for 8-bit weights
    with one scale per channel), fp8 alone or with inputs per token, mxfp8 and mxfp4 with inputs of the same, nvfp4 alone or with
    such inputs. Layers that are kept stay out. Groups that do not divide a row become their greatest common divisor with it; a
    scale per tensor becomes one per channel. Float inputs and blocks want bfloat16 models, and GPUs that have them.

    Raises:
        CladoError: torchao is not installed; or it has no config for a scheme: static inputs, other mixtures, floats of
            convolutions.
    """
    try:
        from torchao.quantization import FqnToConfig
    except ImportError as error:
        raise CladoError(f"recipe: torchao ≥ 0.15 must be installed, got {error}") from None
    configs: dict[str, Any] = {}
    refused: list[str] = []
    for layer in _layers(plan):
        if isinstance(plan.chosen[layer.name].number, Kept) and not plan.chosen[layer.name].input:
            continue
        config = _torchao_config(plan, layer)
        refused += [f"{plan.schemes[layer.name]} of {layer.name}"] if config is None else []
        configs |= dict.fromkeys(modules(layer), config)
    must = (
        "keep to integers (A16, A8_DYNAMIC), FP8A16, FP8_DYNAMIC, MXFP8, MXFP4, NVFP4, NVFP4A16 and 16 bits for torchao"
    )
    _refuse(refused, f"{must}, floats on Linear layers (FP8_DYNAMIC, NVFP4 of sizes that 16 divides)")
    return FqnToConfig(configs)


def _torchao_config(plan: Plan, layer: Layer) -> Any:
    """Of a layer; None where torchao has none."""
    import torch
    from torchao.prototype import mx_formats
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerRow,
    )

    scheme, group = plan.chosen[layer.name], _group(plan, layer)
    if isinstance(scheme.number, Integer):
        kind = MappingType.SYMMETRIC if plan.quantizer.symmetric else MappingType.ASYMMETRIC
        spread = PerAxis(0) if group is None else PerGroup(group)
        dtype = getattr(torch, f"int{scheme.bits}")
        if not scheme.input:
            return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=spread, mapping_type=kind)
        if scheme.input != "int8_dynamic" or layer.kind != "linear":
            return None
        if scheme.bits == 8 and group is None and plan.quantizer.symmetric:
            return Int8DynamicActivationInt8WeightConfig()
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=spread, weight_mapping_type=kind
        )
    sixteens = not any(size % 16 for size in layer.shape)  # it skips fp8 of others without a word
    if layer.kind != "linear" or not (sixteens or scheme.weight.startswith("mx") or not scheme.input):
        return None
    if scheme.weight == scheme.input and scheme.weight in ("mxfp8", "mxfp4"):
        element = torch.float8_e4m3fn if scheme.bits == 8 else torch.float4_e2m1fn_x2
        return mx_formats.MXDynamicActivationMXWeightConfig(
            activation_dtype=element, weight_dtype=element, scaling_mode=ScaleCalculationMode.FLOOR
        )
    wanted: dict[tuple[str, str], Callable[[], Any]] = {
        ("fp8_e4m3", ""): lambda: Float8WeightOnlyConfig(granularity=PerRow()),
        ("fp8_e5m2", ""): lambda: Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=PerRow()),
        ("fp8_e4m3", "fp8_e4m3_dynamic"): lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        ("nvfp4", ""): mx_formats.NVFP4WeightOnlyConfig,
        ("nvfp4", "nvfp4"): mx_formats.NVFP4DynamicActivationNVFP4WeightConfig,
    }
    made = wanted.get((scheme.weight, scheme.input))
    return None if made is None else made()


def torchao_json(plan: Plan) -> dict[str, Any]:
    """:func:`torchao` as JSON; ``torchao.core.config.config_from_dict`` reads it."""
    config = torchao(plan)
    from torchao.core.config import config_to_dict

    written: dict[str, Any] = config_to_dict(config)
    return written


_ELEMENTS = {"fp8_e4m3": (4, 3), "mxfp8": (4, 3), "mxfp4": (2, 1), "nvfp4": (2, 1)}  # bits of exponent and mantissa
_BLOCKS = {"mxfp8": (32, (8, 0)), "mxfp4": (32, (8, 0)), "nvfp4": (16, (4, 3))}  # size, bits of the scale


def modelopt(plan: Plan) -> dict[str, Any]:
    """A config for NVIDIA ModelOpt's ``modelopt.torch.quantization.quantize`` (0.47): weights and inputs of the planned layers.

    ModelOpt's integers are symmetric; an asymmetric plan keeps its widths, and so do static inputs. These need its
    ``forward_loop``. Layers that are kept stay out. As JSON the sizes of blocks are under text where ModelOpt wants ``-1``.

    Raises:
        CladoError: fp8_e5m2, which it has not, or blocks of convolutions, which run along kernels there.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    refused: list[str] = []
    for layer in _layers(plan):
        parts = {"weight": _modelopt_weight(plan, layer), "input": _modelopt_input(plan.chosen[layer.name].input)}
        blocks = {plan.chosen[layer.name].weight, plan.chosen[layer.name].input} & set(_BLOCKS)
        if None in parts.values() or (blocks and layer.kind != "linear"):
            refused.append(f"{plan.schemes[layer.name]} of {layer.name}")
        entries += [
            {"quantizer_name": f"{module}.{part}_quantizer", "cfg": cfg}
            for module in modules(layer)
            for part, cfg in parts.items()
            if cfg
        ]
    must = f"keep to integers, {', '.join(_ELEMENTS)} and 16 bits for modelopt, blocks on Linear layers"
    _refuse(refused, must)
    return {"quant_cfg": entries, "algorithm": "max"}


def _modelopt_weight(plan: Plan, layer: Layer) -> dict[str, Any] | None:
    """The quantizer of a weight; nothing for a kept one, None where ModelOpt has none."""
    number = plan.chosen[layer.name].number
    if isinstance(number, Kept):
        return {}
    if isinstance(number, Integer):
        group = _group(plan, layer) if layer.kind == "linear" else None
        spread: dict[str, Any] = {"axis": 0} if group is None else {"block_sizes": {-1: group, "type": "static"}}
        return {"num_bits": number.bits, **spread}
    if number.name == "fp8_e4m3":
        return {"num_bits": _ELEMENTS[number.name], "axis": None if plan.quantizer.group_size == 0 else 0}
    return _modelopt_blocks(number.name)


def _modelopt_input(name: str) -> dict[str, Any] | None:
    """The quantizer of an input; nothing for one that stays, None where ModelOpt has none."""
    if not name:
        return {}
    stem, dynamic = name.removesuffix("_dynamic"), name.endswith("_dynamic")
    if stem in _BLOCKS:
        return _modelopt_blocks(stem)
    bits = int(stem.removeprefix("int")) if stem.startswith("int") else _ELEMENTS.get(stem)
    if bits is None or (isinstance(bits, int) and not 2 <= bits <= 8):
        return None
    per_token = {"type": "dynamic", "block_sizes": {-1: None}} if dynamic else {}
    return {"num_bits": bits, "axis": None, **per_token}


def _modelopt_blocks(name: str) -> dict[str, Any] | None:
    if name not in _BLOCKS:
        return None
    size, scale_bits = _BLOCKS[name]
    return {"num_bits": _ELEMENTS[name], "block_sizes": {-1: size, "type": "dynamic", "scale_bits": scale_bits}}


_QUANTO_WEIGHTS = {f"int{bits}": f"qint{bits}" for bits in (2, 4, 8)}
_QUANTO_WEIGHTS |= {"fp8_e4m3": "qfloat8_e4m3fn", "fp8_e5m2": "qfloat8_e5m2"}
_QUANTO_INPUTS = {"int8": "qint8", "fp8_e4m3": "qfloat8_e4m3fn", "fp8_e5m2": "qfloat8_e5m2"}


def quanto(plan: Plan) -> list[dict[str, Any]]:
    """Keyword arguments for one ``optimum.quanto.quantize``, one call per scheme, then ``freeze(model)``.

    Where inputs are rounded its ``Calibration`` runs before that; its integers of inputs are symmetric. Kept layers stay out.

    Raises:
        CladoError: widths other than 2, 4 and 8, blocks, or inputs other than static ones of 8 bits: quanto has no others.
    """
    named: dict[tuple[int, str, str], list[str]] = {}
    refused: list[str] = []
    for layer in _layers(plan):
        scheme = plan.chosen[layer.name]
        if isinstance(scheme.number, Kept) and not scheme.input:
            continue
        known = scheme.weight in _QUANTO_WEIGHTS and scheme.input in ("", *_QUANTO_INPUTS)
        refused += [] if known else [f"{scheme} of {layer.name}"]
        named.setdefault((scheme.bits, scheme.weight, scheme.input), []).extend(modules(layer))
    _refuse(refused, "keep to 2, 4 and 8 bits, fp8 and static inputs of 8 bits for quanto")
    calls = []
    for (_, weight, input), names in sorted(named.items()):
        activations = {"activations": _QUANTO_INPUTS[input]} if input else {}
        calls.append({"weights": _QUANTO_WEIGHTS[weight], **activations, "include": names})
    return calls


def _refuse(refused: list[str], must: str) -> None:
    """Raise for what a tool has no word for."""
    require(not refused, "recipe", "plan", must, some(refused))


def _layers(plan: Plan) -> tuple[Layer, ...]:
    require(bool(plan.bits), "recipe", "plan", "hold bits for every layer", f"a plan that is {plan.status}")
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

"""Packages of others that do the same work, where they are installed. Their layouts differ; the codes that come back do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness import Works

_COMPRESSED = (
    "compressed_tensors.compressors.pack_quantized.helpers",
    "compressed_tensors.compressors.quantized_compressors.pack_quantized",
)


def _find(modules: tuple[str, ...], name: str) -> Callable[..., Any] | None:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


def _quanto(codes: Tensor, bits: int) -> Tensor | None:
    """Codes in optimum-quanto's layout (unsigned, 2 or 4 bits)."""
    pack_weights = _find(("optimum.quanto.tensor.packed",), "pack_weights")
    return pack_weights((codes + 2 ** (bits - 1)).to(torch.uint8), bits) if pack_weights and bits in (2, 4) else None


def pack(codes: Tensor, bits: int) -> Works:
    works: Works = {}
    if to_int32 := _find(_COMPRESSED, "pack_to_int32"):
        works["compressed-tensors"] = lambda: to_int32(codes, bits)
    if _quanto(codes[:1], bits) is not None:
        works["quanto"] = lambda: _quanto(codes, bits)
    return works


def unpack(codes: Tensor, bits: int) -> Works:
    works: Works = {}
    to_int32, from_int32 = _find(_COMPRESSED, "pack_to_int32"), _find(_COMPRESSED, "unpack_from_int32")
    if to_int32 and from_int32:
        packed = to_int32(codes, bits)
        works["compressed-tensors"] = lambda: from_int32(packed, bits, codes.shape)
    theirs = _quanto(codes, bits)
    if theirs is not None:
        works["quanto"] = lambda: torch.ops.quanto.unpack(theirs, bits)
    return works


def fake_quant(weight: Tensor, scale: Tensor, bits: tuple[int, ...]) -> Works:
    """torchao, one call per width."""
    affine = _find(("torchao.quantization.quant_primitives",), "_fake_quantize_affine")
    affine = affine or _find(("torchao.quantization.quant_primitives",), "fake_quantize_affine")
    if affine is None:
        return {}
    block, zero = (1, weight.shape[1]), torch.zeros(len(weight), dtype=torch.int32, device=weight.device)

    def all_widths() -> list[Tensor]:
        limits = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in bits]
        return [affine(weight, block, s[:, 0], zero, torch.int8, *lim) for s, lim in zip(scale, limits, strict=True)]

    return {"torchao x3": all_widths}


def casts(weight: Tensor, scales: Sequence[Any]) -> Works:
    """torchao's casts to fp8_e4m3, mxfp4 and nvfp4, one after the other: to codes and block scales, and back to values."""
    to_mx = _find(("torchao.prototype.mx_formats.mx_tensor",), "to_mx")
    from_mx = _find(("torchao.prototype.mx_formats.mx_tensor",), "to_dtype")
    to_nv = _find(("torchao.prototype.mx_formats.nvfp4_tensor",), "nvfp4_quantize")
    to_fp8 = _find(("torchao.quantization.quant_primitives",), "_quantize_affine_float8")
    from_fp8 = _find(("torchao.quantization.quant_primitives",), "_dequantize_affine_float8")
    if to_mx is None or from_mx is None or to_nv is None or to_fp8 is None or from_fp8 is None:
        return {}
    fp8, below = scales[0].scale, 1 / scales[2].tensor_scale
    e4m3, e2m1 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2

    def codes() -> list[Any]:
        return [to_fp8(weight, fp8, e4m3), to_mx(weight, e2m1, 32), to_nv(weight, 16, below)]

    def values() -> list[Any]:
        first, (exponents, mx), _ = codes()
        return [from_fp8(first, fp8, weight.dtype), from_mx(mx, exponents, e2m1, 32, weight.dtype)]

    return {"torchao casts x3": codes, "torchao casts x3, two of them back": values}


def compensate(weight: Tensor, moments: Tensor, scale: Tensor, bits: tuple[int, ...], damping: float) -> Works:
    """GPTQ of others, at given scales, columns in their order: values ``[B, N, K]``.

    Moments ``[K, K]`` (float32) are not damped yet: each package damps and factorizes, in every call and for every width.
    torchao's is left out: it takes no scales, 4 and 8 bits alone, and no CPU.
    """
    adapters = {  # imported before anything is timed
        "brevitas": (_brevitas, "brevitas.graph.gptq", "GPTQ"),
        "gptqmodel": (_gptqmodel, "gptqmodel.quantization.gptq", "GPTQ"),
        "llmcompressor": (_llmcompressor, "llmcompressor.modifiers.gptq.gptq_quantize", "quantize_weight"),
        "modelopt": (_modelopt, "modelopt.torch.quantization.utils.calib_utils", "gptq_blockwise_update"),
    }

    def all_widths(adapter: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]) -> Tensor:
        given = zip(scale, bits, strict=True)
        return torch.stack([adapter(weight.clone(), moments.clone(), s, b, damping) for s, b in given])

    return {
        package: partial(all_widths, adapter)
        for package, (adapter, module, name) in adapters.items()
        if _find((module,), name)
    }


def _brevitas(weight: Tensor, moments: Tensor, scale: Tensor, bits: int, damping: float) -> Tensor:
    from brevitas.graph.gptq import GPTQ
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    layer = QuantLinear(
        *reversed(weight.shape),
        bias=False,
        device=weight.device,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=bits,
        weight_narrow_range=False,
        weight_scaling_impl_type="const",
        weight_scaling_init=scale * 2 ** (bits - 1),
    )
    layer.weight.data = weight
    blocks = -(-weight.shape[1] // 128)
    task = GPTQ(layer, "", False, 1, False, blocks, weight.device)  # no reordering, alone, no copy of the weight
    task.H = moments[None]
    task.single_layer_update(percdamp=damping)
    return layer.quant_weight().value


def _gptqmodel(weight: Tensor, moments: Tensor, scale: Tensor, bits: int, damping: float) -> Tensor:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device)
    layer.weight.data = weight
    config = QuantizeConfig(
        bits=bits, group_size=-1, desc_act=False, act_group_aware=False, damp_percent=damping, offload_to_disk=False
    )
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    task.quantizer.scale, task.quantizer.zero = scale, torch.full_like(scale, 2 ** (bits - 1))
    task.quantizer.find_params = lambda *_, **__: None  # the scales are given
    task.H, task.nsamples = moments, 1
    return task.quantize()[0]


def _llmcompressor(weight: Tensor, moments: Tensor, scale: Tensor, bits: int, damping: float) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel")
    zero = torch.zeros_like(scale)[None]
    return quantize_weight(weight[None], moments[None], scale[None], zero, None, arguments, percdamp=damping)[0][0]


def _modelopt(weight: Tensor, moments: Tensor, scale: Tensor, bits: int, damping: float) -> Tensor:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits, axis=0), amax=scale * (2 ** (bits - 1) - 1))
    gptq_blockwise_update(weight, compute_hessian_inverse(moments, weight, damping), 128, quantizer)
    return weight

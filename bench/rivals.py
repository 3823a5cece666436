"""Packages of others that do the same work, where they are installed. Their layouts differ; the codes that come back do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Works = dict[str, Callable[[], Any]]
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

"""Kernels for mixed-precision quantization as torch ops, for CPU and CUDA. Needs torch alone."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from ._native import has_cuda, set_simd, simd_level
from .batched_ce import batched_ce
from .bitpack import pack, pack_into, packed_columns, unpack, unpack_into
from .carried import carried_add_layer_norm, carried_gelu, carried_layer_norm, carried_softmax
from .compensate import compensate
from .fake_quant import (
    QuantizedWeight,
    dequantize,
    fake_quant,
    fake_quant_into,
    quantize,
    quantize_weight,
    straight_through,
)
from .iqp_prove import iqp_prove
from .iqp_search import iqp_search
from .pairwise_ce import pairwise_ce
from .scale_errors import scale_errors
from .scale_search import range_search, scale_search

__all__ = [
    "QuantizedWeight",
    "batched_ce",
    "carried_add_layer_norm",
    "carried_gelu",
    "carried_layer_norm",
    "carried_softmax",
    "compensate",
    "dequantize",
    "fake_quant",
    "fake_quant_into",
    "has_cuda",
    "iqp_prove",
    "iqp_search",
    "pack",
    "pack_into",
    "packed_columns",
    "pairwise_ce",
    "quantize",
    "quantize_weight",
    "range_search",
    "scale_errors",
    "scale_search",
    "set_simd",
    "simd_level",
    "straight_through",
    "unpack",
    "unpack_into",
]

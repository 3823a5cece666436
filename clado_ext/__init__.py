"""Kernels for mixed-precision quantization as torch ops, for CPU and CUDA. Needs torch alone."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from ._formats import FormatScale
from ._native import has_cuda, set_simd, simd_level
from ._native import version as __version__
from .batched_ce import batched_ce
from .bitpack import pack, packed_columns, unpack
from .carried import carried_add_layer_norm, carried_gelu, carried_layer_norm, carried_softmax
from .compensate import compensate, compensate_format
from .fake_quant import (
    QuantizedWeight,
    dequantize,
    dequantize_formats,
    fake_quant,
    fake_quant_formats,
    quantize,
    quantize_formats,
    quantize_weight,
    straight_through,
)
from .iqp_prove import iqp_prove
from .iqp_search import iqp_search
from .pairwise_bce import pairwise_bce
from .pairwise_ce import pairwise_ce
from .pairwise_mse import pairwise_mse
from .scale_errors import scale_errors
from .scale_search import format_search, range_search, scale_search, tensor_scale

__all__ = [
    "FormatScale",
    "QuantizedWeight",
    "__version__",
    "batched_ce",
    "carried_add_layer_norm",
    "carried_gelu",
    "carried_layer_norm",
    "carried_softmax",
    "compensate",
    "compensate_format",
    "dequantize",
    "dequantize_formats",
    "fake_quant",
    "fake_quant_formats",
    "format_search",
    "has_cuda",
    "iqp_prove",
    "iqp_search",
    "pack",
    "packed_columns",
    "pairwise_bce",
    "pairwise_ce",
    "pairwise_mse",
    "quantize",
    "quantize_formats",
    "quantize_weight",
    "range_search",
    "scale_errors",
    "scale_search",
    "set_simd",
    "simd_level",
    "straight_through",
    "tensor_scale",
    "unpack",
]

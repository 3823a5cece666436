"""Kernels for mixed-precision quantization as torch ops, for CPU and CUDA. Needs torch alone."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from ._native import has_cuda, set_simd, simd_level
from .bitpack import pack, packed_columns, unpack
from .fake_quant import dequantize, fake_quant, fake_quant_into, quantize
from .scale_search import scale_search

__all__ = [
    "dequantize",
    "fake_quant",
    "fake_quant_into",
    "has_cuda",
    "pack",
    "packed_columns",
    "quantize",
    "scale_search",
    "set_simd",
    "simd_level",
    "unpack",
]

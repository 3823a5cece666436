"""Kernels for mixed-precision quantization as torch ops, for CPU and CUDA. Needs torch alone."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from ._native import has_cuda, set_simd, simd_level
from .bitpack import pack, packed_columns, unpack
from .iqp_prove import iqp_prove
from .iqp_search import iqp_search

__all__ = [
    "has_cuda",
    "iqp_prove",
    "iqp_search",
    "pack",
    "packed_columns",
    "set_simd",
    "simd_level",
    "unpack",
]

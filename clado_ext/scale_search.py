"""Scales of symmetric quantization by least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._registry import call, define, require
from ._weights import DTYPES, check_weight, matrix_shape

MAX_STEPS = 99


def scale_search(weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95) -> Tensor:
    """Find one scale per output channel, or per group of inputs, for every bit-width.

    For each group the scales ``absmax / (2**(bits-1) - 1) * (1 - k/100)``, k = 0 … ``steps`` - 1, are tried and the one of least
    squared error is taken (the search of CLADO, arXiv 2307.05657, public code: 95 steps). Errors are added in a fixed order, so
    the scales have the same bits on every device, SIMD level and thread count.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``; for one scale per tensor pass ``reshape(1, -1)``.
        bits: distinct ascending widths, 2 to 8; B of them.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns (the last group may be shorter).
        steps: shrink factors tried, 1 (absmax) to 99.

    Returns:
        float32 ``[B, N, groups]``: positive; 1 for a group of zeros; NaN for a group that holds NaN or infinity.

    Raises:
        ValueError: wrong dtype, rank, widths, group size or steps.
    """
    return torch.ops.clado.scale_search(weight, bits, group_size, steps)


def _allocate(weight: Tensor, bits: Sequence[int], group_size: int, steps: int) -> Tensor:
    check_weight("scale_search", weight, bits, group_size)
    require(1 <= steps <= MAX_STEPS, "scale_search", "steps", f"lie in 1..{MAX_STEPS}", steps)
    rows, _, _, groups = matrix_shape(weight, group_size)
    return weight.new_empty((len(bits), rows, groups), dtype=torch.float32)


def _launch(weight: Tensor, bits: Sequence[int], group_size: int, steps: int, out: Tensor) -> None:
    rows, columns, size, _ = matrix_shape(weight, group_size)
    source = weight.contiguous()
    bytes_needed = _native.scale_search_workspace(rows, columns, size, len(bits), steps) if weight.is_cuda else 0
    workspace = weight.new_empty(bytes_needed, dtype=torch.uint8)
    extra = (workspace.data_ptr(),) if weight.is_cuda else ()
    if out.numel():
        addresses = (source.data_ptr(), DTYPES[weight.dtype], out.data_ptr())
        call("scale_search", weight.device, *addresses, rows, columns, size, list(bits), steps, *extra)


define("scale_search(Tensor weight, int[] bits, int group_size, int steps) -> Tensor", _allocate, _launch)

"""Scales, and zero points, by least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._registry import call, checked, define
from ._weights import check_steps, check_weight, given, matrix_shape


@checked
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
    return _scale_search(weight, bits, group_size, steps)


@checked
def range_search(weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95) -> tuple[Tensor, Tensor]:
    """:func:`scale_search` for asymmetric quantization: the range [min(w, 0), max(w, 0)] is shrunk from both ends.

    Args:
        weight, bits, group_size, steps: as :func:`scale_search`.

    Returns:
        scale, float32 ``[B, N, groups]``, and zero_point, int8 of the same shape in ``[-2**(bits-1), 2**(bits-1) - 1]``:
        ``w ≈ (code - zero_point) * scale``. A group of zeros has scale 1, one that is not finite scale NaN; zero point 0.

    Raises:
        ValueError: as :func:`scale_search`.
    """
    return _range_search(weight, bits, group_size, steps)


def _allocate(weight: Tensor, bits: Sequence[int], group_size: int, steps: int, op: str = "scale_search") -> Tensor:
    check_weight(op, weight, bits, group_size)
    check_steps(op, steps)
    rows, _, _, groups = matrix_shape(weight, group_size)
    return weight.new_empty((len(bits), rows, groups), dtype=torch.float32)


def _allocate_range(weight: Tensor, bits: Sequence[int], group_size: int, steps: int) -> tuple[Tensor, Tensor]:
    scale = _allocate(weight, bits, group_size, steps, "range_search")
    return scale, torch.empty_like(scale, dtype=torch.int8)


def _launch(
    weight: Tensor, bits: Sequence[int], group_size: int, steps: int, scale: Tensor, zero_point: Tensor | None = None
) -> None:
    weight, numbers = given(weight, group_size)
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, size = numbers
        bytes_needed = _native.scale_search_workspace(rows, columns, size, len(bits), steps)
        workspace = weight.new_empty(bytes_needed, dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    if scale.numel():
        addresses = (scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr())
        call("scale_search", weight.device, numbers, bits, steps, *addresses, *extra)


_scale_search = define(
    "scale_search(Tensor weight, int[] bits, int group_size, int steps) -> Tensor", _allocate, _launch
)
_range_search = define(
    "range_search(Tensor weight, int[] bits, int group_size, int steps) -> (Tensor, Tensor)", _allocate_range, _launch
)

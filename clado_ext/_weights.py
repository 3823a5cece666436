"""What the quantization ops share: checks of a weight, its widths and its groups, and how the native module takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _native
from ._native import LEAST_BITS, MOST_BITS, MOST_STEPS
from ._registry import refusal

DTYPES = {torch.float32: _native.FLOAT32, torch.float16: _native.FLOAT16, torch.bfloat16: _native.BFLOAT16}


def check_weight(op: str, weight: Tensor, bits: Sequence[int], group_size: int) -> None:
    """Raise ``ValueError`` unless ``weight`` is ``[N, …]`` of a known dtype and ``bits``, ``group_size`` make sense."""
    if weight.dtype not in DTYPES:
        raise refusal(op, "weight", f"be {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}", weight.dtype)
    if weight.dim() < 1:
        raise refusal(op, "weight", "have at least one dimension", "0")
    if not _ascending(tuple(bits)):
        raise refusal(op, "bits", f"be distinct ascending widths in {LEAST_BITS}..{MOST_BITS}", tuple(bits))
    if group_size != -1 and group_size <= 0:
        raise refusal(op, "group_size", "be -1 or positive", group_size)


def check_scales(
    op: str, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> None:
    """:func:`check_weight`, and raise unless ``scale``, and ``zero_point`` where there is one, fit the weight."""
    check_weight(op, weight, bits, group_size)
    rows, _, _, groups = matrix_shape(weight, group_size)
    shape = (len(bits), rows, groups)
    check_like(op, "scale", scale, torch.float32, shape, weight)
    if zero_point is not None:
        check_like(op, "zero_point", zero_point, torch.int8, shape, weight)


def check_like(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], weight: Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` has that shape and dtype and lies where the weight does."""
    if tensor.shape != shape:
        raise refusal(op, name, f"have shape {shape}", tuple(tensor.shape))
    if tensor.dtype != dtype:
        raise refusal(op, name, f"be {str(dtype).removeprefix('torch.')}", tensor.dtype)
    if tensor.device != weight.device:
        raise refusal(op, name, f"be on {weight.device}", tensor.device)


def check_steps(op: str, steps: int) -> None:
    """Raise ``ValueError`` unless a search can try so many shrink factors."""
    if not 1 <= steps <= MOST_STEPS:
        raise refusal(op, "steps", f"lie in 1..{MOST_STEPS}", steps)


@lru_cache
def _ascending(bits: tuple[int, ...]) -> bool:
    return len(bits) > 0 and list(bits) == sorted(set(bits)) and bits[0] >= LEAST_BITS and bits[-1] <= MOST_BITS


def matrix_shape(weight: Tensor, group_size: int) -> tuple[int, int, int, int]:
    """(rows, columns, columns per group, groups) of the ``[N, K]`` view of a weight ``[N, …]``."""
    rows = weight.shape[0]
    columns = weight.numel() // rows if rows else math.prod(weight.shape[1:])
    size = (columns if group_size == -1 else min(group_size, columns)) or 1
    return rows, columns, size, -(-columns // size)


def given(weight: Tensor, group_size: int) -> tuple[Tensor, _native.Weight]:
    """The weight, or a contiguous copy, which has to outlive the call, and how the native functions take it.

    No copy is made of a matrix whose rows lie apart, as long as the elements of a row are side by side.
    """
    rows, columns, size, _ = matrix_shape(weight, group_size)
    row_stride = columns
    if not weight.is_contiguous():
        if weight.dim() == 2 and weight.stride(1) == 1:
            row_stride = weight.stride(0)
        else:
            weight = weight.contiguous()
    return weight, (weight.data_ptr(), DTYPES[weight.dtype], rows, columns, row_stride, size)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()

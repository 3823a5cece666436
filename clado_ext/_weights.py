"""What the quantization ops share: checks of a weight, its widths and its groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._registry import refusal

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def check_weight(op: str, weight: Tensor, bits: Sequence[int], group_size: int) -> None:
    """Raise ``ValueError`` unless ``weight`` is ``[N, …]`` of a known dtype and ``bits``, ``group_size`` make sense."""
    if weight.dtype not in DTYPES:
        raise refusal(op, "weight", f"be {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}", weight.dtype)
    if weight.dim() < 1:
        raise refusal(op, "weight", "have at least one dimension", "0")
    if not _ascending(tuple(bits)):
        raise refusal(op, "bits", "be distinct ascending widths in 2..8", tuple(bits))
    if group_size != -1 and group_size <= 0:
        raise refusal(op, "group_size", "be -1 or positive", group_size)


@lru_cache
def _ascending(bits: tuple[int, ...]) -> bool:
    return len(bits) > 0 and list(bits) == sorted(set(bits)) and bits[0] >= 2 and bits[-1] <= 8


def matrix_shape(weight: Tensor, group_size: int) -> tuple[int, int, int, int]:
    """(rows, columns, columns per group, groups) of the ``[N, K]`` view of a weight ``[N, …]``."""
    rows = weight.shape[0]
    columns = weight.numel() // rows if rows else math.prod(weight.shape[1:])
    size = (columns if group_size == -1 else min(group_size, columns)) or 1
    return rows, columns, size, -(-columns // size)

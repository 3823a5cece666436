"""What the quantization ops share: checks of a weight, its widths and its groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._registry import require

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def check_weight(op: str, weight: Tensor, bits: Sequence[int], group_size: int) -> None:
    """Raise ``ValueError`` unless ``weight`` is ``[N, …]`` of a known dtype and ``bits``, ``group_size`` make sense."""
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    require(weight.dtype in DTYPES, op, "weight", f"be {names}", weight.dtype)
    require(weight.dim() >= 1, op, "weight", "have at least one dimension", f"{weight.dim()}")
    ascending = len(bits) > 0 and list(bits) == sorted(set(bits)) and bits[0] >= 2 and bits[-1] <= 8
    require(ascending, op, "bits", "be distinct ascending widths in 2..8", tuple(bits))
    require(group_size == -1 or group_size > 0, op, "group_size", "be -1 or positive", group_size)


def matrix_shape(weight: Tensor, group_size: int) -> tuple[int, int, int, int]:
    """(rows, columns, columns per group, groups) of the ``[N, K]`` view of a weight ``[N, …]``."""
    columns = math.prod(weight.shape[1:])
    size = columns if group_size == -1 else min(group_size, columns)
    size = max(size, 1)
    return weight.shape[0], columns, size, -(-columns // size)

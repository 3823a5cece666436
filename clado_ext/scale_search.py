"""Scales, and zero points, by least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._registry import call, checked, define, refusal
from ._weights import address, check_like, check_steps, check_weight, given, matrix_shape


@checked
def scale_search(
    weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95, importance: Tensor | None = None
) -> Tensor:
    """Find one scale per output channel, or per group of inputs, for every bit-width.

    For each group the scales ``absmax / (2**(bits-1) - 1) * (1 - k/100)``, k = 0 … ``steps`` - 1, are tried and the one of least
    squared error is taken, the first among equals (the search of CLADO, arXiv 2307.05657, public code: 95 steps). Errors are
    added in a fixed order, so the scales have the same bits on every device, SIMD level and thread count.

    With ``importance``, the diagonal of the second moments of the layer's input, the error is ``Σ importance * (w - q)²``: what
    rounding does to the layer's output, were its inputs uncorrelated. Only ratios within a group matter, and any magnitude
    will do. A group that has no importance where its weights are not zero (inputs that were never on) is searched without. Where
    all that counts rounds to zero at several scales, these are equals but for float32's rounding: any of them may be taken.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``; for one scale per tensor pass ``reshape(1, -1)``.
        bits: distinct ascending widths, 2 to 8; B of them.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns (the last group may be shorter).
        steps: shrink factors tried, 1 (absmax) to 99.
        importance: float32 ``[K]``, or ``[G, K]`` with a row for each N/G consecutive rows (a grouped convolution has one per
            group), finite and not negative; None: all count alike.

    Returns:
        float32 ``[B, N, groups]``: positive; 1 for a group of zeros; NaN for a group that holds NaN or infinity.

    Raises:
        ValueError: shapes, dtypes, devices, widths, group size or steps that do not fit; on the CPU also an importance that is
            negative or not finite (CUDA: the scales of the groups that it counts in are NaN).
    """
    return _scale_search(weight, bits, group_size, steps, importance)


@checked
def range_search(
    weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`scale_search` for asymmetric quantization: the range [min(w, 0), max(w, 0)] is shrunk from both ends.

    Args:
        weight, bits, group_size, steps, importance: as :func:`scale_search`.

    Returns:
        scale, float32 ``[B, N, groups]``, and zero_point, int8 of the same shape in ``[-2**(bits-1), 2**(bits-1) - 1]``:
        ``w ≈ (code - zero_point) * scale``. A group of zeros has scale 1, one that is not finite scale NaN; zero point 0.

    Raises:
        ValueError: as :func:`scale_search`.
    """
    return _range_search(weight, bits, group_size, steps, importance)


def _allocate(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int,
    steps: int,
    importance: Tensor | None,
    op: str = "scale_search",
) -> Tensor:
    check_weight(op, weight, bits, group_size)
    check_steps(op, steps)
    rows, columns, _, groups = matrix_shape(weight, group_size)
    if importance is not None:
        count = importance.shape[0] if importance.dim() == 2 else 1
        if importance.dim() not in (1, 2) or count < 1 or rows % count:
            must = f"be [K] or [G, K] where G divides the {rows} rows"
            raise refusal(op, "importance", must, tuple(importance.shape))
        shape = (count, columns) if importance.dim() == 2 else (columns,)
        check_like(op, "importance", importance, torch.float32, shape, weight)
    return weight.new_empty((len(bits), rows, groups), dtype=torch.float32)


def _allocate_range(
    weight: Tensor, bits: Sequence[int], group_size: int, steps: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = _allocate(weight, bits, group_size, steps, importance, "range_search")
    return scale, torch.empty_like(scale, dtype=torch.int8)


def _launch(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int,
    steps: int,
    importance: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None = None,
) -> None:
    if not scale.numel():
        return
    weight, numbers = given(weight, group_size)
    taken = (0, 1)
    if importance is not None:
        importance = importance.contiguous()
        taken = (importance.data_ptr(), importance.shape[0] if importance.dim() == 2 else 1)
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, size = numbers
        bytes_needed = _native.scale_search_workspace(rows, columns, size, len(bits), steps)
        workspace = weight.new_empty(bytes_needed, dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    addresses = (scale.data_ptr(), address(zero_point))
    sound = call("scale_search", weight.device, numbers, bits, steps, taken, *addresses, *extra)
    if sound is False and importance is not None:
        op = "scale_search" if zero_point is None else "range_search"
        bad = importance[~((importance >= 0) & importance.isfinite())]
        raise refusal(op, "importance", "be finite and not negative", bad[0].item())


_scale_search = define(
    "scale_search(Tensor weight, int[] bits, int group_size, int steps, Tensor? importance) -> Tensor",
    _allocate,
    _launch,
)
_range_search = define(
    "range_search(Tensor weight, int[] bits, int group_size, int steps, Tensor? importance) -> (Tensor, Tensor)",
    _allocate_range,
    _launch,
)

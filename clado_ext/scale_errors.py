"""Squared errors under scales that the caller proposes: the inner loop of any search for a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._native import MOST_STEP
from ._registry import Empty, call, checked, define, refusal, require, run
from ._weights import check_like, check_weight, given, matrix_shape


@checked
def scale_errors(
    weight: Tensor, scale: Tensor, low: int, high: int, group_size: int = -1, out: Tensor | None = None
) -> Tensor:
    """Rate candidate scales by squared error, all of them in one read of the weight.

    ``error = Σ (round_half_even(clamp(w / scale, low, high)) * scale - w)²`` over the group, in float32, the quotient as a
    product with the reciprocal. This is what a search with a grid or a stopping rule of its own needs; where any grid will do,
    :func:`scale_search` tries 95 steps in less time, since it leaves out those that cannot win. Errors are added in a fixed
    order, so they have the same bits on every device, SIMD level and thread count.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``; for one scale per tensor pass ``reshape(1, -1)``.
        scale: float32 ``[S, N, groups]``, S candidates for every group; 0 rounds everything to 0, negative ones are allowed.
        low, high: the least and the largest step, ``-65536 ≤ low ≤ 0 ≤ high ≤ 65536``: -8 and 7 for four bits, -7 and 7 for their
            narrow range, 0 and 15 unsigned, ``-zero_point`` and ``15 - zero_point`` with an integer zero point.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns (the last group may be shorter).
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        float64 ``[S, N, groups]``; NaN where the group holds NaN or its scale is not finite.

    Raises:
        ValueError: shapes, dtypes, devices, steps or group size that do not fit.
    """
    return run(_scale_errors, (weight, scale, low, high, group_size), out)


def _allocate(empty: Empty, weight: Tensor, scale: Tensor, low: int, high: int, group_size: int) -> Tensor:
    op = "scale_errors"
    check_weight(op, weight, (4,), group_size)
    require(-MOST_STEP <= low <= 0, op, "low", f"lie in {-MOST_STEP}..0", low)
    require(0 <= high <= MOST_STEP, op, "high", f"lie in 0..{MOST_STEP}", high)
    if scale.dim() != 3:
        raise refusal(op, "scale", "be [S, N, groups]", tuple(scale.shape))
    rows, _, _, groups = matrix_shape(weight, group_size)
    check_like(op, "scale", scale, torch.float32, (scale.shape[0], rows, groups), weight)
    return empty(weight, scale.shape, torch.float64)


def _launch(weight: Tensor, scale: Tensor, low: int, high: int, group_size: int, errors: Tensor) -> None:
    if not errors.numel():
        return
    weight, numbers = given(weight, group_size)
    scale = scale.contiguous()
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, size = numbers
        bytes_needed = _native.scale_errors_workspace(rows, columns, size, scale.shape[0])
        workspace = weight.new_empty(bytes_needed, dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    proposed = (scale.data_ptr(), scale.shape[0], low, high)
    call("scale_errors", weight.device, numbers, proposed, errors.data_ptr(), *extra)


_scale_errors = define(
    "scale_errors(Tensor weight, Tensor scale, int low, int high, int group_size) -> Tensor", _allocate, _launch
)

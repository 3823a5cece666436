"""Rounding that pays for itself: every column makes up for the errors of those before it, all bit-widths in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._formats import FormatScale, check_formats, format_of
from ._registry import Empty, call, checked, define, refusal, run
from ._weights import address, check_like, check_scales, given, matrix_shape


@checked
def compensate(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    zero_point: Tensor | None = None,
    order: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Round column by column at every bit-width, so that the layer loss ``tr((W - Q) H (W - Q)ᵀ)`` stays small.

    H are the (damped) second moments of the layer's input and U the upper Cholesky factor of their inverse, ``H⁻¹ = UᵀU``. A
    column is rounded as :func:`quantize` does, ``e = (w_i - q_i) / U_ii``, and the columns after it make up for it,
    ``w_j -= e * U_ij`` (GPTQ, arXiv 2210.17323). H and U know nothing of the width: one factor serves them all. Float32 in a
    fixed order: the same codes on every device, SIMD level and thread count.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``.
        factor: float32 ``[G, K, K]``, any strides: G factors U, each for N/G consecutive rows (a grouped convolution has one
            per group). Only the upper triangle is read.
        scale: float32 ``[B, N, groups]``, fixed beforehand, e.g. by :func:`scale_search`.
        bits: distinct ascending widths, 2 to 8; B of them.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns of the weight, whatever the order.
        zero_point: int8 like ``scale`` for asymmetric quantization; None for symmetric.
        order: int64 ``[G, K]``: row and column i of the factor are column ``order[i]`` of the weight, and columns are rounded in
            that order; None: as they stand.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        int8 codes ``[B, N, …]`` in the weight's own order, and float64 ``[B, N]`` the layer loss of each row. What is not finite
        in a row, its scales or the factor, or a zero on the factor's diagonal, makes the row's loss NaN or infinite.

    Raises:
        ValueError: shapes, dtypes, devices, widths or group size that do not fit; on the CPU also an order that is no permutation
            (CUDA: a number that is no column makes losses NaN, and a column that is not named gets an arbitrary code).
    """
    given = (weight.detach(), factor.detach(), scale.detach(), zero_point, order, bits, group_size)
    return run(_compensate, given, out)


@checked
def compensate_format(
    weight: Tensor,
    factor: Tensor,
    scale: FormatScale,
    order: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`compensate` in one number format of any kind, under scales that are fixed beforehand.

    Args:
        weight, factor, order: as :func:`compensate`.
        scale: the format and its scales, as :func:`format_search` gives them.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        codes int8 ``[N, …]`` as :func:`quantize_formats` has them, and float64 ``[N]`` the layer loss of each row.

    Raises:
        ValueError: as :func:`compensate`, or an unknown format.
    """
    element = format_of("compensate_format", scale.format).element
    given = (weight.detach(), factor.detach(), scale.scale.detach(), scale.zero_point, order)
    return run(_compensate_format, (*given, element, scale.group_size), out)


def _allocate_format(
    empty: Empty,
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor | None,
    element: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    op = "compensate_format"
    check_formats(op, weight, [scale], [zero_point], [element], [group_size])
    _check_factor(op, weight, factor, order)
    return empty(weight, weight.shape, torch.int8), empty(weight, weight.shape[:1], torch.float64)


def _launch_format(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor | None,
    element: int,
    group_size: int,
    codes: Tensor,
    loss: Tensor,
) -> None:
    _launch(weight, factor, scale, zero_point, order, [element], group_size, codes, loss)


def _check_factor(op: str, weight: Tensor, factor: Tensor, order: Tensor | None) -> None:
    rows, columns, _, _ = matrix_shape(weight, -1)
    factors = factor.shape[0] if factor.dim() else 0
    if factors < 1 or rows % factors:
        raise refusal(op, "factor", f"be [G, K, K] where G divides the {rows} rows", tuple(factor.shape))
    check_like(op, "factor", factor, torch.float32, (factors, columns, columns), weight)
    if order is not None:
        check_like(op, "order", order, torch.int64, (factors, columns), weight)


def _allocate(
    empty: Empty,
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor | None,
    bits: Sequence[int],
    group_size: int,
) -> tuple[Tensor, Tensor]:
    check_scales("compensate", weight, scale, zero_point, bits, group_size)
    _check_factor("compensate", weight, factor, order)
    codes = empty(weight, (len(bits), *weight.shape), torch.int8)
    return codes, empty(weight, (len(bits), weight.shape[0]), torch.float64)


def _launch(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor | None,
    bits: Sequence[int],
    group_size: int,
    codes: Tensor,
    loss: Tensor,
) -> None:
    weight, numbers = given(weight, group_size)
    scales = scale.contiguous()
    zeros, orders = (None if x is None else x.contiguous() for x in (zero_point, order))
    if codes.numel() == 0:
        loss.zero_()
        return
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, _ = numbers
        workspace = weight.new_empty(_native.compensate_workspace(rows, columns, len(bits)), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    taken = (factor.data_ptr(), address(orders), factor.shape[0], *factor.stride())
    addresses = (scales.data_ptr(), address(zeros), codes.data_ptr(), loss.data_ptr())
    sound = call("compensate", weight.device, numbers, bits, taken, *addresses, *extra)
    if sound is False:
        raise refusal("compensate", "order", "name every column once per factor", "an order that does not")


_compensate = define(
    "compensate(Tensor weight, Tensor factor, Tensor scale, Tensor? zero_point, Tensor? order, int[] bits, int group_size)"
    " -> (Tensor, Tensor)",
    _allocate,
    _launch,
)
_compensate_format = define(
    "compensate_format(Tensor weight, Tensor factor, Tensor scale, Tensor? zero_point, Tensor? order, int element,"
    " int group_size) -> (Tensor, Tensor)",
    _allocate_format,
    _launch_format,
)

"""Quantize a weight at several bit-widths in one read: values with their squared error, or integer codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._registry import call, define, require
from ._weights import DTYPES, check_weight, matrix_shape

_BLOCK = 1024  # csrc/common/weights.h


def fake_quant(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize at every bit-width, reading the weight once.

    ``code = clamp(round_half_even(w / scale), -2**(bits-1), 2**(bits-1) - 1)`` in float32, ``value = code * scale``.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``.
        scale: float32 ``[B, N, groups]``, as :func:`scale_search` returns it.
        bits: distinct ascending widths, 2 to 8; B of them.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns.

    Returns:
        values ``[B, N, …]`` in the weight's dtype; float64 ``[B, N]`` squared error of each row, Σ (value - w)². NaN gives NaN.

    Raises:
        ValueError: wrong dtype, rank, widths, group size, or a scale of another shape or device.
    """
    return torch.ops.clado.fake_quant(weight, scale, bits, group_size)


def fake_quant_into(
    weight: Tensor, scale: Tensor, bits: Sequence[int], values: Tensor, sqerr: Tensor, group_size: int = -1
) -> None:
    """:func:`fake_quant` into outputs the caller owns: contiguous ``values`` and ``sqerr`` of the shapes given there.

    Raises:
        ValueError: as :func:`fake_quant`, or outputs of another shape, dtype, device or layout.
    """
    expected = _allocate_fake_quant(weight.to("meta"), scale.to("meta"), bits, group_size)
    for name, got, want in (("values", values, expected[0]), ("sqerr", sqerr, expected[1])):
        fits = (
            got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous() and got.device == weight.device
        )
        require(
            fits,
            "fake_quant_into",
            name,
            f"be contiguous {want.dtype} {tuple(want.shape)} on {weight.device}",
            f"{got.dtype} {tuple(got.shape)} on {got.device}",
        )
    _launch_fake_quant(weight, scale, bits, group_size, values, sqerr)


def quantize(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1) -> Tensor:
    """Integer codes at every bit-width; arguments as :func:`fake_quant`.

    Returns:
        int8 ``[B, N, …]``, each code in ``[-2**(bits-1), 2**(bits-1) - 1]``; NaN gives 0.
    """
    return torch.ops.clado.quantize(weight, scale, bits, group_size)


def dequantize(codes: Tensor, scale: Tensor, group_size: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale`` in float32, rounded to ``dtype``: bit for bit the values of :func:`fake_quant`.

    Args:
        codes: int8 ``[B, N, …]``.
        scale: float32 ``[B, N, groups]``.
        group_size: as :func:`fake_quant`.
        dtype: of the result.

    Returns:
        ``[B, N, …]``.

    Raises:
        ValueError: codes that are not int8, or a scale of another shape.
    """
    require(
        codes.dtype == torch.int8 and codes.dim() >= 2,
        "dequantize",
        "codes",
        "be int8 [B, N, …]",
        f"{codes.dtype} {tuple(codes.shape)}",
    )
    rows, columns, size, groups = matrix_shape(codes[0], group_size)
    require(
        scale.shape == (codes.shape[0], rows, groups),
        "dequantize",
        "scale",
        f"have shape {(codes.shape[0], rows, groups)}",
        tuple(scale.shape),
    )
    spread = scale.float().repeat_interleave(size, -1)[..., :columns] if groups > 1 else scale.float()
    return (
        (codes.flatten(2).float() * spread).to(dtype).view(codes.shape)
        if codes.dim() > 2
        else (codes.unsqueeze(-1).float() * spread).to(dtype).view(codes.shape)
    )


def _check(op: str, weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int) -> None:
    check_weight(op, weight, bits, group_size)
    rows, _, _, groups = matrix_shape(weight, group_size)
    require(
        scale.shape == (len(bits), rows, groups),
        op,
        "scale",
        f"have shape {(len(bits), rows, groups)}",
        tuple(scale.shape),
    )
    require(scale.dtype == torch.float32, op, "scale", "be float32", scale.dtype)
    require(scale.device == weight.device, op, "scale", f"be on {weight.device}", scale.device)


def _allocate_fake_quant(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int) -> tuple[Tensor, Tensor]:
    _check("fake_quant", weight, scale, bits, group_size)
    return (
        weight.new_empty((len(bits), *weight.shape)),
        weight.new_empty((len(bits), weight.shape[0]), dtype=torch.float64),
    )


def _launch_fake_quant(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int, values: Tensor, sqerr: Tensor
) -> None:
    rows, columns, size, _ = matrix_shape(weight, group_size)
    source, scales = weight.contiguous(), scale.contiguous()
    workspace = weight.new_empty(len(bits) * rows * -(-columns // _BLOCK), dtype=torch.float32)
    addresses = (scales.data_ptr(), values.data_ptr(), sqerr.data_ptr(), workspace.data_ptr())
    call(
        "fake_quant",
        weight.device,
        source.data_ptr(),
        DTYPES[weight.dtype],
        *addresses,
        rows,
        columns,
        size,
        list(bits),
    )


def _allocate_quantize(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int) -> Tensor:
    _check("quantize", weight, scale, bits, group_size)
    return weight.new_empty((len(bits), *weight.shape), dtype=torch.int8)


def _launch_quantize(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int, codes: Tensor) -> None:
    rows, columns, size, _ = matrix_shape(weight, group_size)
    source, scales = weight.contiguous(), scale.contiguous()
    addresses = (scales.data_ptr(), codes.data_ptr())
    call(
        "quantize", weight.device, source.data_ptr(), DTYPES[weight.dtype], *addresses, rows, columns, size, list(bits)
    )


define(
    "fake_quant(Tensor weight, Tensor scale, int[] bits, int group_size) -> (Tensor, Tensor)",
    _allocate_fake_quant,
    _launch_fake_quant,
)
define(
    "quantize(Tensor weight, Tensor scale, int[] bits, int group_size) -> Tensor", _allocate_quantize, _launch_quantize
)

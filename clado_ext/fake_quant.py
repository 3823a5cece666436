"""Quantize a weight at several bit-widths in one read: values with their squared error, or integer codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._registry import call, check_output, checked, define, fill, require
from ._weights import address, check_scales, check_steps, check_weight, given, matrix_shape


class QuantizedWeight(NamedTuple):
    """What :func:`quantize_weight` returns; shapes and dtypes as :func:`fake_quant` and the searches give them."""

    values: Tensor
    sqerr: Tensor
    scale: Tensor
    zero_point: Tensor | None


@checked
def fake_quant(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize at every bit-width, reading the weight once.

    ``step = round_half_even(clamp(w / scale, -2**(bits-1) - zero_point, 2**(bits-1) - 1 - zero_point))`` in float32,
    ``value = step * scale``.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``.
        scale: float32 ``[B, N, groups]``, as :func:`scale_search` or :func:`range_search` return it.
        bits: distinct ascending widths, 2 to 8; B of them.
        group_size: -1 one scale per row, g > 0 one per g consecutive columns.
        zero_point: int8 like ``scale`` for asymmetric quantization; None for symmetric.

    Returns:
        values ``[B, N, …]`` in the weight's dtype; float64 ``[B, N]`` squared error of each row, Σ (value - w)². NaN gives NaN.
        A backward pass through them raises: :func:`straight_through` gives values that pass gradients.

    Raises:
        ValueError: wrong dtype, rank, widths, group size, or a scale or zero point of another shape or device.
    """
    values, sqerr = _fake_quant(weight, scale, zero_point, bits, group_size)
    if values.requires_grad:
        _stop_gradients("fake_quant", values)
    return values, sqerr


@checked
def fake_quant_into(
    weight: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    values: Tensor,
    sqerr: Tensor,
    group_size: int = -1,
    zero_point: Tensor | None = None,
) -> None:
    """:func:`fake_quant` into outputs the caller owns: contiguous ``values`` and ``sqerr`` of the shapes given there.

    Raises:
        ValueError: as :func:`fake_quant`, or outputs of another shape, dtype, device or layout.
    """
    check_scales("fake_quant_into", weight, scale, zero_point, bits, group_size)
    check_output("fake_quant_into", "values", values, weight, (len(bits), *weight.shape), weight.dtype)
    check_output("fake_quant_into", "sqerr", sqerr, weight, (len(bits), weight.shape[0]), torch.float64)
    fill(_launch_fake_quant, (weight, scale, zero_point, bits, group_size), (values, sqerr))


@checked
def quantize(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1, zero_point: Tensor | None = None
) -> Tensor:
    """Integer codes at every bit-width; arguments as :func:`fake_quant`.

    Returns:
        int8 ``[B, N, …]``, ``step + zero_point``, each in ``[-2**(bits-1), 2**(bits-1) - 1]``; NaN gives 0.
    """
    return _quantize(weight, scale, zero_point, bits, group_size)


@checked
def dequantize(
    codes: Tensor,
    scale: Tensor,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
    zero_point: Tensor | None = None,
) -> Tensor:
    """``(codes - zero_point) * scale`` in float32, rounded to ``dtype``: bit for bit the values of :func:`fake_quant`.

    Args:
        codes: int8 ``[B, N, …]``.
        scale: float32 ``[B, N, groups]``.
        group_size: as :func:`fake_quant`.
        dtype: of the result.
        zero_point: int8 like ``scale``, or None.

    Returns:
        ``[B, N, …]``.

    Raises:
        ValueError: codes that are not int8, or a scale or zero point of another shape.
    """
    require(group_size == -1 or group_size > 0, "dequantize", "group_size", "be -1 or positive", group_size)
    sound = codes.dtype == torch.int8 and codes.dim() >= 2
    require(sound, "dequantize", "codes", "be int8 [B, N, …]", f"{codes.dtype} {tuple(codes.shape)}")
    rows, columns, size, groups = matrix_shape(codes[0], group_size)
    shape = (codes.shape[0], rows, groups)
    require(scale.shape == shape, "dequantize", "scale", f"have shape {shape}", tuple(scale.shape))
    if zero_point is not None:
        require(zero_point.shape == shape, "dequantize", "zero_point", f"have shape {shape}", tuple(zero_point.shape))
    steps = (codes.flatten(2) if codes.dim() > 2 else codes.unsqueeze(-1)).float()
    if zero_point is not None:
        steps = steps - _spread(zero_point.float(), size, columns)
    return (steps * _spread(scale.float(), size, columns)).to(dtype).view(codes.shape)


@checked
def quantize_weight(
    weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95, symmetric: bool = True
) -> QuantizedWeight:
    """Search the scales and quantize in one pass, row by row: what a post-training quantizer does to a weight.

    Bit for bit :func:`scale_search` or :func:`range_search` and then :func:`fake_quant`.

    Args:
        weight, bits, group_size: as :func:`fake_quant`.
        steps: shrink factors tried, 1 (absmax) to 99.
        symmetric: False searches zero points too.

    Returns:
        values ``[B, N, …]``, sqerr ``[B, N]``, scale ``[B, N, groups]`` and zero_point (None when symmetric).

    Raises:
        ValueError: wrong dtype, rank, widths, group size or steps.
    """
    values, sqerr, scale, zero_point = _quantize_weight(weight, bits, group_size, steps, symmetric)
    if values.requires_grad:
        _stop_gradients("quantize_weight", values)
    return QuantizedWeight(values, sqerr, scale, None if symmetric else zero_point)


@checked
def straight_through(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1, zero_point: Tensor | None = None
) -> Tensor:
    """Values of :func:`fake_quant` that pass gradients: for quantization-aware training.

    The gradient reaches every weight whose step was not clamped, summed over the widths (straight-through estimator,
    Bengio et al. 2013); scales and zero points are constants.

    Args:
        weight, scale, bits, group_size, zero_point: as :func:`fake_quant`.

    Returns:
        ``[B, N, …]`` in the weight's dtype.
    """
    values: Tensor = _StraightThrough.apply(weight, scale, zero_point, bits, group_size)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.bits, ctx.group = bits, group
        return fake_quant(weight, scale, bits, group, zero_point)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale, zero_point = ctx.saved_tensors
        _, columns, size, _ = matrix_shape(weight, ctx.group)
        flat = weight.reshape(weight.shape[0], -1).float()
        total = torch.zeros_like(flat)
        for k, bits in enumerate(ctx.bits):
            steps = flat / _spread(scale[k], size, columns)
            zero = 0.0 if zero_point is None else _spread(zero_point[k].float(), size, columns)
            low, high = -(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero
            inside = (steps >= low) & (steps <= high)
            total += torch.where(inside, gradients[0][k].reshape(flat.shape).float(), 0.0)
        return total.to(weight.dtype).view(weight.shape), None, None, None, None


def _stop_gradients(op: str, output: Tensor) -> None:
    """Make a backward pass through an op, of which this is one output, raise: torch would warn and give no gradient."""

    def refuse(gradients: tuple[Tensor, ...]) -> None:
        raise RuntimeError(f"{op}: gradients do not pass through it; use clado_ext.straight_through")

    if not torch.compiler.is_compiling() and output.grad_fn is not None:  # a compiled graph takes no hook
        output.grad_fn.register_prehook(refuse)


def _spread(values: Tensor, size: int, columns: int) -> Tensor:
    """``[..., groups]`` -> one per column ``[..., columns]``, or ``[..., 1]`` where one group covers the row."""
    return values.repeat_interleave(size, -1)[..., :columns] if values.shape[-1] > 1 else values


def _allocate_fake_quant(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> tuple[Tensor, Tensor]:
    check_scales("fake_quant", weight, scale, zero_point, bits, group_size)
    return (
        weight.new_empty((len(bits), *weight.shape)),
        weight.new_empty((len(bits), weight.shape[0]), dtype=torch.float64),
    )


def _launch_fake_quant(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: Sequence[int],
    group_size: int,
    values: Tensor,
    sqerr: Tensor,
) -> None:
    weight, numbers = given(weight, group_size)
    scales, zeros = scale.contiguous(), _contiguous(zero_point)
    addresses = (scales.data_ptr(), address(zeros), values.data_ptr(), sqerr.data_ptr())
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, _ = numbers
        workspace = weight.new_empty(_native.fake_quant_workspace(rows, columns, len(bits)), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    call("fake_quant", weight.device, numbers, bits, *addresses, *extra)


def _allocate_quantize_weight(
    weight: Tensor, bits: Sequence[int], group_size: int, steps: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_weight("quantize_weight", weight, bits, group_size)
    check_steps("quantize_weight", steps)
    rows, _, _, groups = matrix_shape(weight, group_size)
    scale = weight.new_empty((len(bits), rows, groups), dtype=torch.float32)
    return (
        weight.new_empty((len(bits), *weight.shape)),
        weight.new_empty((len(bits), rows), dtype=torch.float64),
        scale,
        scale.new_empty(0 if symmetric else scale.shape, dtype=torch.int8),
    )


def _launch_quantize_weight(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int,
    steps: int,
    symmetric: bool,
    values: Tensor,
    sqerr: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> None:
    weight, numbers = given(weight, group_size)
    zeros = 0 if symmetric else zero_point.data_ptr()
    addresses = (scale.data_ptr(), zeros, values.data_ptr(), sqerr.data_ptr())
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, size = numbers
        for_search = _native.scale_search_workspace(rows, columns, size, len(bits), steps)
        for_errors = _native.fake_quant_workspace(rows, columns, len(bits))
        workspaces = [weight.new_empty(n, dtype=torch.uint8) for n in (for_search, for_errors)]
        extra = tuple(workspace.data_ptr() for workspace in workspaces)
    call("quantize_weight", weight.device, numbers, bits, steps, *addresses, *extra)


def _allocate_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> Tensor:
    check_scales("quantize", weight, scale, zero_point, bits, group_size)
    return weight.new_empty((len(bits), *weight.shape), dtype=torch.int8)


def _launch_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int, codes: Tensor
) -> None:
    weight, numbers = given(weight, group_size)
    scales, zeros = scale.contiguous(), _contiguous(zero_point)
    addresses = (scales.data_ptr(), address(zeros), codes.data_ptr())
    call("quantize", weight.device, numbers, bits, *addresses)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_fake_quant = define(
    "fake_quant(Tensor weight, Tensor scale, Tensor? zero_point, int[] bits, int group_size) -> (Tensor, Tensor)",
    _allocate_fake_quant,
    _launch_fake_quant,
)
_quantize = define(
    "quantize(Tensor weight, Tensor scale, Tensor? zero_point, int[] bits, int group_size) -> Tensor",
    _allocate_quantize,
    _launch_quantize,
)
_quantize_weight = define(
    "quantize_weight(Tensor weight, int[] bits, int group_size, int steps, bool symmetric)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_quantize_weight,
    _launch_quantize_weight,
)

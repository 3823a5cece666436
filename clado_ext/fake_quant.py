"""Quantize a weight in several formats in one read: values with their squared error, or codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._formats import FormatScale, check_formats, element_values, format_of, native_formats, native_widths
from ._registry import Empty, call, checked, define, given_or_new, require, run
from ._weights import check_scales, check_steps, check_weight, given, matrix_shape


class QuantizedWeight(NamedTuple):
    """What :func:`quantize_weight` returns; shapes and dtypes as :func:`fake_quant` and the searches give them."""

    values: Tensor
    sqerr: Tensor
    scale: Tensor
    zero_point: Tensor | None


@checked
def fake_quant(
    weight: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    zero_point: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
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
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        values ``[B, N, …]`` in the weight's dtype; float64 ``[B, N]`` squared error of each row, Σ (value - w)². NaN gives NaN.
        A backward pass through them raises: :func:`straight_through` gives values that pass gradients.

    Raises:
        ValueError: wrong dtype, rank, widths, group size, or a scale or zero point of another shape or device.
    """
    values, sqerr = run(_fake_quant, (weight, scale, zero_point, bits, group_size), out)
    if values.requires_grad:
        _stop_gradients("fake_quant", values)
    return values, sqerr


@checked
def quantize(
    weight: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Integer codes at every bit-width; arguments as :func:`fake_quant`, ``out`` the codes alone.

    Returns:
        int8 ``[B, N, …]``, ``step + zero_point``, each in ``[-2**(bits-1), 2**(bits-1) - 1]``; NaN gives 0.
    """
    return run(_quantize, (weight, scale, zero_point, bits, group_size), out)


@checked
def dequantize(
    codes: Tensor,
    scale: Tensor,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
    zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(codes - zero_point) * scale`` in float32, rounded to ``dtype``: bit for bit the values of :func:`fake_quant`.

    Args:
        codes: int8 ``[B, N, …]``.
        scale: float32 ``[B, N, groups]``.
        group_size: as :func:`fake_quant`.
        dtype: of the result.
        zero_point: int8 like ``scale``, or None.
        out: to write into instead of new memory: contiguous, as returned.

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
    values = given_or_new("dequantize", codes, codes.shape, dtype, out)
    steps = (codes.flatten(2) if codes.dim() > 2 else codes.unsqueeze(-1)).float()
    _scaled(steps, scale, zero_point, size, columns, values.view(steps.shape))
    return values


@checked
def fake_quant_formats(
    weight: Tensor, scales: Sequence[FormatScale], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quant` in any number formats, integers and floats mixed, each with scales and groups of its own.

    The weight is read once. A float element becomes the value nearest to ``w / scale`` (ties to the even code, saturated: no
    infinity or NaN is ever made of a finite weight), times ``scale``.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``.
        scales: F formats with their scales, as :func:`clado_ext.format_search` gives them, in any order.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        values ``[F, N, …]`` in the weight's dtype; float64 ``[F, N]`` squared error of each row. NaN gives NaN.

    Raises:
        ValueError: wrong dtype or rank, an unknown format, more than 16, or a scale of another shape or device.
    """
    values, sqerr = run(_fake_quant_formats, (weight, *_parts("fake_quant_formats", scales)), out)
    if values.requires_grad:
        _stop_gradients("fake_quant_formats", values)
    return values, sqerr


@checked
def quantize_formats(weight: Tensor, scales: Sequence[FormatScale], out: Tensor | None = None) -> Tensor:
    """Codes in any number formats; arguments and errors as :func:`fake_quant_formats`, ``out`` the codes alone.

    Returns:
        int8 ``[F, N, …]``: integers as :func:`quantize` has them; an fp8 element's bits, as ``.view(torch.float8_e4m3fn)`` reads
        them; of fp4 (e2m1) the four bits, 0 to 15. NaN gives 0.
    """
    return run(_quantize_formats, (weight, *_parts("quantize_formats", scales)), out)


@checked
def dequantize_formats(
    codes: Tensor, scales: Sequence[FormatScale], dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Element values times scales in float32, rounded to ``dtype``: bit for bit the values of :func:`fake_quant_formats`.

    Args:
        codes: int8 ``[F, N, …]`` of :func:`quantize_formats`.
        scales: F formats with their scales.
        dtype: of the result.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        ``[F, N, …]``.

    Raises:
        ValueError: codes that are not int8, or scales that do not fit them.
    """
    op = "dequantize_formats"
    sound = codes.dtype == torch.int8 and codes.dim() >= 2 and len(codes) == len(scales)
    require(sound, op, "codes", f"be int8 [{len(scales)}, N, …]", f"{codes.dtype} {tuple(codes.shape)}")
    values = given_or_new(op, codes, codes.shape, dtype, out)
    for own, to, plane in zip(codes, scales, values, strict=True):
        rows, columns, size, groups = matrix_shape(own, to.group_size)
        got = tuple(to.scale.shape)
        require(got == (rows, groups), op, "scale", f"have shape {(rows, groups)}", got)
        steps = element_values(own.flatten(1) if own.dim() > 1 else own.unsqueeze(-1), format_of(op, to.format).element)
        _scaled(steps, to.scale, to.zero_point, size, columns, plane.view(steps.shape))
    return values


@checked
def quantize_weight(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    steps: int = 95,
    symmetric: bool = True,
    out: QuantizedWeight | None = None,
) -> QuantizedWeight:
    """Search the scales and quantize in one pass, row by row: what a post-training quantizer does to a weight.

    Bit for bit :func:`scale_search` or :func:`range_search` and then :func:`fake_quant`.

    Args:
        weight, bits, group_size: as :func:`fake_quant`.
        steps: shrink factors tried, 1 (absmax) to 99.
        symmetric: False searches zero points too.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        values ``[B, N, …]``, sqerr ``[B, N]``, scale ``[B, N, groups]`` and zero_point (None when symmetric).

    Raises:
        ValueError: wrong dtype, rank, widths, group size or steps.
    """
    target = None
    if out is not None:
        none = weight.new_empty(0, dtype=torch.int8)
        target = (*out[:3], none if out.zero_point is None else out.zero_point)
    values, sqerr, scale, zero_point = run(_quantize_weight, (weight, bits, group_size, steps, symmetric), target)
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


def _scaled(steps: Tensor, scale: Tensor, zero_point: Tensor | None, size: int, columns: int, values: Tensor) -> None:
    """Write (steps - zero point) * scale, products in float32, into ``values``."""
    if zero_point is not None:
        steps = steps - _spread(zero_point.float(), size, columns)
    with torch.no_grad():
        torch.mul(steps, _spread(scale.float(), size, columns), out=values)


def _spread(values: Tensor, size: int, columns: int) -> Tensor:
    """``[..., groups]`` -> one per column ``[..., columns]``, or ``[..., 1]`` where one group covers the row."""
    return values.repeat_interleave(size, -1)[..., :columns] if values.shape[-1] > 1 else values


def _allocate_fake_quant(
    empty: Empty, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> tuple[Tensor, Tensor]:
    check_scales("fake_quant", weight, scale, zero_point, bits, group_size)
    return _values_and_errors(empty, weight, len(bits))


def _values_and_errors(empty: Empty, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values ``[count, N, …]`` and their squared errors ``[count, N]``, yet to be computed."""
    values = empty(weight, (count, *weight.shape), weight.dtype)
    return values, empty(weight, (count, weight.shape[0]), torch.float64)


def _launch_fake_quant(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: Sequence[int],
    group_size: int,
    values: Tensor,
    sqerr: Tensor,
) -> None:
    formats, kept = native_widths(weight, scale, zero_point, bits, group_size)
    _run_fake_quant(weight, formats, values, sqerr)
    del kept


def _launch_fake_quant_formats(
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
    values: Tensor,
    sqerr: Tensor,
) -> None:
    formats, kept = native_formats(weight, scales, zero_points, elements, group_sizes)
    _run_fake_quant(weight, formats, values, sqerr)
    del kept


def _run_fake_quant(weight: Tensor, formats: list[_native.Format], values: Tensor, sqerr: Tensor) -> None:
    weight, numbers = given(weight, -1)
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, _ = numbers
        workspace = weight.new_empty(_native.fake_quant_workspace(rows, columns, len(formats)), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    call("fake_quant", weight.device, numbers, formats, values.data_ptr(), sqerr.data_ptr(), *extra)


def _allocate_quantize_weight(
    empty: Empty, weight: Tensor, bits: Sequence[int], group_size: int, steps: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_weight("quantize_weight", weight, bits, group_size)
    check_steps("quantize_weight", steps)
    rows, _, _, groups = matrix_shape(weight, group_size)
    values, sqerr = _values_and_errors(empty, weight, len(bits))
    scale = empty(weight, (len(bits), rows, groups), torch.float32)
    return values, sqerr, scale, empty(weight, (0,) if symmetric else scale.shape, torch.int8)


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
    empty: Empty, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> Tensor:
    check_scales("quantize", weight, scale, zero_point, bits, group_size)
    return empty(weight, (len(bits), *weight.shape), torch.int8)


def _launch_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int, codes: Tensor
) -> None:
    formats, kept = native_widths(weight, scale, zero_point, bits, group_size)
    weight, numbers = given(weight, -1)
    call("quantize", weight.device, numbers, formats, codes.data_ptr())
    del kept


def _allocate_fake_quant_formats(
    empty: Empty,
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    check_formats("fake_quant_formats", weight, scales, zero_points, elements, group_sizes)
    return _values_and_errors(empty, weight, len(scales))


def _allocate_quantize_formats(
    empty: Empty,
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
) -> Tensor:
    check_formats("quantize_formats", weight, scales, zero_points, elements, group_sizes)
    return empty(weight, (len(scales), *weight.shape), torch.int8)


def _launch_quantize_formats(
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
    codes: Tensor,
) -> None:
    weight, numbers = given(weight, -1)
    formats, kept = native_formats(weight, scales, zero_points, elements, group_sizes)
    call("quantize", weight.device, numbers, formats, codes.data_ptr())
    del kept


Parts = tuple[list[Tensor], list[Tensor | None], list[int], list[int]]  # scales, zero points, elements, group sizes


def _parts(op: str, scales: Sequence[FormatScale]) -> Parts:
    elements = [format_of(op, to.format).element for to in scales]
    return [to.scale for to in scales], [to.zero_point for to in scales], elements, [to.group_size for to in scales]


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
_fake_quant_formats = define(
    "fake_quant_formats(Tensor weight, Tensor[] scales, Tensor?[] zero_points, int[] elements, int[] group_sizes)"
    " -> (Tensor, Tensor)",
    _allocate_fake_quant_formats,
    _launch_fake_quant_formats,
)
_quantize_formats = define(
    "quantize_formats(Tensor weight, Tensor[] scales, Tensor?[] zero_points, int[] elements, int[] group_sizes)"
    " -> Tensor",
    _allocate_quantize_formats,
    _launch_quantize_formats,
)
_quantize_weight = define(
    "quantize_weight(Tensor weight, int[] bits, int group_size, int steps, bool symmetric)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_quantize_weight,
    _launch_quantize_weight,
)

"""Scales, and zero points, by least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._formats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    FORMATS,
    FormatScale,
    check_count,
    check_matrix,
    format_of,
)
from ._registry import Empty, call, checked, define, refusal, run
from ._weights import address, check_like, check_steps, check_weight, given, matrix_shape

# So that no scale of nvfp4 is below the least normal float32: 2^-9 / 2^117 = 2^-126.
_MOST_TENSOR_SCALE = 2.0**117


@checked
def scale_search(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    steps: int = 95,
    importance: Tensor | None = None,
    out: Tensor | None = None,
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
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        float32 ``[B, N, groups]``: positive; 1 for a group of zeros; NaN for a group that holds NaN or infinity.

    Raises:
        ValueError: shapes, dtypes, devices, widths, group size or steps that do not fit; on the CPU also an importance that is
            negative or not finite (CUDA: the scales of the groups that it counts in are NaN).
    """
    return run(_scale_search, (weight, bits, group_size, steps, importance), out)


@checked
def range_search(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    steps: int = 95,
    importance: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`scale_search` for asymmetric quantization: the range [min(w, 0), max(w, 0)] is shrunk from both ends.

    Args:
        weight, bits, group_size, steps, importance: as :func:`scale_search`.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        scale, float32 ``[B, N, groups]``, and zero_point, int8 of the same shape in ``[-2**(bits-1), 2**(bits-1) - 1]``:
        ``w ≈ (code - zero_point) * scale``. A group of zeros has scale 1, one that is not finite scale NaN; zero point 0.

    Raises:
        ValueError: as :func:`scale_search`.
    """
    return run(_range_search, (weight, bits, group_size, steps, importance), out)


@checked
def format_search(
    weight: Tensor,
    formats: Sequence[str],
    group_size: int = -1,
    steps: int = 95,
    symmetric: bool = True,
    importance: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    out: Sequence[FormatScale] | None = None,
) -> list[FormatScale]:
    """Scales of a weight in any number formats, integers and floats mixed, from one read of it.

    Integers are searched as :func:`scale_search` does, or as :func:`range_search` where ``symmetric`` is False. Floats are
    symmetric and have groups of their own: ``fp8_e4m3`` and ``fp8_e5m2`` one scale per row, by the integers' grid below ``absmax
    / largest``; ``mxfp8``, ``mxfp4`` (blocks of 32 columns) powers of two and ``nvfp4`` (blocks of 16) float8_e4m3 values over
    the tensor's scale. One step gives the scale of the standards: OCP MX 1.0 for the mx formats, ``e4m3(absmax / 6 *
    tensor_scale)`` for nvfp4. More steps try what a block can store from twice that scale down to the last step's share of it
    and take the least squared error, the largest among equals.

    Args:
        weight: float32, float16 or bfloat16 ``[N, …]``, seen as ``[N, K]``; for one scale per tensor pass ``reshape(1, -1)``.
        formats: names of :class:`FormatScale`, distinct or not; F of them. A block that ends beyond the row is cut there.
        group_size: of integers: -1 one scale per row, g > 0 one per g consecutive columns.
        steps: shrink factors tried, 1 (absmax) to 99.
        symmetric: whether integers have no zero point.
        importance: as :func:`scale_search`.
        tensor_scale: of nvfp4, float32 ``[1]``; None: :func:`tensor_scale` of this weight.
        out: what an earlier call gave: its scales and zero points are written to, nothing else of it is read.

    Returns:
        F scales. Groups of zeros: 1, for nvfp4 the least that it stores; groups that hold NaN or infinity: NaN.

    Raises:
        ValueError: as :func:`scale_search`, or an unknown format.
    """
    known = [format_of("format_search", name) for name in formats]
    if tensor_scale is None and any(own.rule == _native.E4M3_SCALE for own in known):
        tensor_scale = _tensor_scale(weight)
    target = None
    if out is not None:
        if len(out) != len(formats):
            raise refusal("format_search", "out", f"be {len(formats)} FormatScale", len(out))
        none = weight.new_empty(0, dtype=torch.int8)
        target = ([to.scale for to in out], [none if to.zero_point is None else to.zero_point for to in out])
    given = (weight, formats, group_size, steps, symmetric, importance, tensor_scale)
    scales, zeros = run(_format_search, given, target)
    return [
        FormatScale(
            name,
            scale,
            _group_of(name, group_size),
            None if symmetric or own.is_float else zero,
            tensor_scale if own.rule == _native.E4M3_SCALE else None,
        )
        for name, own, scale, zero in zip(formats, known, scales, zeros, strict=True)
    ]


@checked
def tensor_scale(weight: Tensor) -> Tensor:
    """What the scales of nvfp4 blocks are divided by, so that the largest is a float8_e4m3: ``448 * 6 / max |w|``.

    Args:
        weight: float32, float16 or bfloat16.

    Returns:
        float32 ``[1]``, at most 2**117; 1 for a weight of zeros, NaN for one that is not finite.
    """
    check_matrix("tensor_scale", weight)
    return _tensor_scale(weight)


def _tensor_scale(weight: Tensor) -> Tensor:
    weight = weight.detach()
    if weight.numel() == 0:
        return torch.ones(1, device=weight.device)
    least, largest = torch.aminmax(weight)
    absmax = torch.maximum(-least, largest).float().reshape(1)
    found = (E4M3_LARGEST * E2M1_LARGEST / absmax).clamp(max=_MOST_TENSOR_SCALE)
    found = torch.where(absmax == 0, 1.0, found)
    return torch.where(absmax.isinf(), torch.nan, found)


def _group_of(name: str, group_size: int) -> int:
    own = FORMATS[name]
    return own.block or (-1 if own.is_float else group_size)


def _allocate(
    empty: Empty,
    weight: Tensor,
    bits: Sequence[int],
    group_size: int,
    steps: int,
    importance: Tensor | None,
    op: str = "scale_search",
) -> Tensor:
    check_weight(op, weight, bits, group_size)
    check_steps(op, steps)
    _check_importance(op, weight, importance)
    rows, _, _, groups = matrix_shape(weight, group_size)
    return empty(weight, (len(bits), rows, groups), torch.float32)


def _check_importance(op: str, weight: Tensor, importance: Tensor | None) -> None:
    rows, columns, _, _ = matrix_shape(weight, -1)
    if importance is not None:
        count = importance.shape[0] if importance.dim() == 2 else 1
        if importance.dim() not in (1, 2) or count < 1 or rows % count:
            must = f"be [K] or [G, K] where G divides the {rows} rows"
            raise refusal(op, "importance", must, tuple(importance.shape))
        shape = (count, columns) if importance.dim() == 2 else (columns,)
        check_like(op, "importance", importance, torch.float32, shape, weight)


def _allocate_range(
    empty: Empty, weight: Tensor, bits: Sequence[int], group_size: int, steps: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = _allocate(empty, weight, bits, group_size, steps, importance, "range_search")
    return scale, empty(weight, scale.shape, torch.int8)


def _launch(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int,
    steps: int,
    importance: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None = None,
) -> None:
    rows, _, size, groups = matrix_shape(weight, group_size)
    at, at_zero, apart = scale.data_ptr(), address(zero_point), rows * groups
    targets = [
        (b, size, _native.ANY_SCALE, 0, at + 4 * k * apart, at_zero and at_zero + k * apart) for k, b in enumerate(bits)
    ]
    _run("scale_search" if zero_point is None else "range_search", weight, targets, steps, importance)


def _run(op: str, weight: Tensor, targets: list[_native.Target], steps: int, importance: Tensor | None) -> None:
    if not weight.numel():
        return
    weight, numbers = given(weight, -1)
    taken = (0, 1)
    if importance is not None:
        importance = importance.contiguous()
        taken = (importance.data_ptr(), importance.shape[0] if importance.dim() == 2 else 1)
    extra: tuple[int, ...] = ()
    if weight.is_cuda:
        _, _, rows, columns, _, _ = numbers
        needed = (_native.scale_search_workspace(rows, columns, t[1], len(targets), steps) for t in targets)
        workspace = weight.new_empty(max(needed), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    sound = call("scale_search", weight.device, numbers, targets, steps, taken, *extra)
    if sound is False and importance is not None:
        bad = importance[~((importance >= 0) & importance.isfinite())]
        raise refusal(op, "importance", "be finite and not negative", bad[0].item())


def _allocate_formats(
    empty: Empty,
    weight: Tensor,
    formats: Sequence[str],
    group_size: int,
    steps: int,
    symmetric: bool,
    importance: Tensor | None,
    tensor_scale: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    op = "format_search"
    check_matrix(op, weight)
    check_count(op, len(formats))
    check_steps(op, steps)
    if group_size != -1 and group_size <= 0:
        raise refusal(op, "group_size", "be -1 or positive", group_size)
    _check_importance(op, weight, importance)
    if tensor_scale is not None:
        check_like(op, "tensor_scale", tensor_scale, torch.float32, (1,), weight)
    floats = [format_of(op, name).is_float for name in formats]
    shapes = [matrix_shape(weight, _group_of(name, group_size))[::3] for name in formats]
    scales = [empty(weight, shape, torch.float32) for shape in shapes]
    without = [symmetric or is_float for is_float in floats]
    return scales, [empty(weight, (0,) if no else shape, torch.int8) for no, shape in zip(without, shapes, strict=True)]


def _launch_formats(
    weight: Tensor,
    formats: Sequence[str],
    group_size: int,
    steps: int,
    symmetric: bool,
    importance: Tensor | None,
    tensor_scale: Tensor | None,
    scales: list[Tensor],
    zeros: list[Tensor],
) -> None:
    targets = []
    for name, scale, zero in zip(formats, scales, zeros, strict=True):
        own = FORMATS[name]
        size = matrix_shape(weight, _group_of(name, group_size))[2]
        below = address(tensor_scale) if own.rule == _native.E4M3_SCALE else 0
        zero_address = 0 if symmetric or own.is_float else zero.data_ptr()
        targets.append((own.element, size, own.rule, below, scale.data_ptr(), zero_address))
    _run("format_search", weight, targets, steps, importance)


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
_format_search = define(
    "format_search(Tensor weight, str[] formats, int group_size, int steps, bool symmetric, Tensor? importance,"
    " Tensor? tensor_scale) -> (Tensor[], Tensor[])",
    _allocate_formats,
    _launch_formats,
)

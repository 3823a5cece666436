"""Number formats by name, and what a weight is quantized to in each: the scales that its codes are multiples of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._registry import refusal
from ._weights import DTYPES, address, check_like, matrix_shape

# Largest values of the float elements.
E2M1_LARGEST, E4M3_LARGEST = 6.0, 448.0


class Format(NamedTuple):
    """A number format.

    Attributes:
        element: what the kernels call an element: the bits of an integer, or a float of few bits.
        rule: where scales come from: any float32, a power of two, or a float8_e4m3 below a float32 of the whole tensor.
        block: consecutive columns that share a scale; 0: as the caller says (integers), or the whole row.
    """

    element: int
    rule: int = _native.ANY_SCALE
    block: int = 0

    @property
    def is_float(self) -> bool:
        return self.element > _native.MOST_BITS


FORMATS = {
    **{f"int{bits}": Format(bits) for bits in range(_native.LEAST_BITS, _native.MOST_BITS + 1)},
    "fp8_e4m3": Format(_native.E4M3),
    "fp8_e5m2": Format(_native.E5M2),
    "mxfp8": Format(_native.E4M3, _native.POWER_OF_TWO, 32),
    "mxfp4": Format(_native.E2M1, _native.POWER_OF_TWO, 32),
    "nvfp4": Format(_native.E2M1, _native.E4M3_SCALE, 16),
}


class FormatScale(NamedTuple):
    """A number format and the scales of a weight in it, as :func:`clado_ext.format_search` gives them.

    Attributes:
        format: ``int2`` … ``int8``, ``fp8_e4m3``, ``fp8_e5m2``, ``mxfp8``, ``mxfp4`` or ``nvfp4``.
        scale: float32 ``[N, groups]``: what an element's value is multiplied with.
        group_size: consecutive columns that share a scale; -1: the whole row.
        zero_point: int8 like ``scale``, of an integer that is quantized asymmetrically.
        tensor_scale: of ``nvfp4``, float32 ``[1]``: ``scale * tensor_scale`` is a float8_e4m3, the block's scale as it is stored.
    """

    format: str
    scale: Tensor
    group_size: int = -1
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


def format_of(op: str, name: str) -> Format:
    """The format of a name; ``ValueError`` for one that is not known."""
    if name not in FORMATS:
        raise refusal(op, "formats", f"be among {', '.join(FORMATS)}", repr(name))
    return FORMATS[name]


def check_matrix(op: str, weight: Tensor) -> None:
    """Raise ``ValueError`` unless ``weight`` is ``[N, …]`` of a known dtype."""
    if weight.dtype not in DTYPES:
        raise refusal(op, "weight", f"be {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}", weight.dtype)
    if weight.dim() < 1:
        raise refusal(op, "weight", "have at least one dimension", "0")


def check_count(op: str, count: int) -> None:
    """Raise ``ValueError`` unless a call takes so many formats."""
    if not 1 <= count <= _native.MOST_FORMATS:
        raise refusal(op, "formats", f"be 1 to {_native.MOST_FORMATS}", count)


def check_formats(
    op: str,
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
) -> None:
    """Raise ``ValueError`` unless weight, scales and zero points go together."""
    check_matrix(op, weight)
    check_count(op, len(elements))
    for scale, zero_point, element, group in zip(scales, zero_points, elements, group_sizes, strict=True):
        if group != -1 and group <= 0:
            raise refusal(op, "group_size", "be -1 or positive", group)
        rows, _, _, groups = matrix_shape(weight, group)
        check_like(op, "scale", scale, torch.float32, (rows, groups), weight)
        if zero_point is not None:
            if element > _native.MOST_BITS:
                raise refusal(op, "zero_point", "be None for a format that is no integer", "one")
            check_like(op, "zero_point", zero_point, torch.int8, (rows, groups), weight)


def native_formats(
    weight: Tensor,
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    elements: Sequence[int],
    group_sizes: Sequence[int],
) -> tuple[list[_native.Format], list[Tensor]]:
    """How the native functions take formats, and the contiguous tensors that have to outlive the call."""
    kept: list[Tensor] = []
    taken: list[_native.Format] = []
    for scale, zero_point, element, group in zip(scales, zero_points, elements, group_sizes, strict=True):
        held = scale.contiguous()
        zeros = None if zero_point is None else zero_point.contiguous()
        kept += [held] if zeros is None else [held, zeros]
        taken.append((element, matrix_shape(weight, group)[2], held.data_ptr(), address(zeros)))
    return taken, kept


def native_widths(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: Sequence[int], group_size: int
) -> tuple[list[_native.Format], list[Tensor]]:
    """:func:`native_formats` of widths whose scales are ``[B, N, groups]``."""
    rows, _, size, groups = matrix_shape(weight, group_size)
    held = scale.contiguous()
    zeros = None if zero_point is None else zero_point.contiguous()
    at, at_zero, apart = held.data_ptr(), address(zeros), rows * groups
    taken = [(b, size, at + 4 * k * apart, at_zero and at_zero + k * apart) for k, b in enumerate(bits)]
    return taken, [held] if zeros is None else [held, zeros]


def element_values(codes: Tensor, element: int) -> Tensor:
    """What codes int8 stand for before they are scaled, float32."""
    if element == _native.E4M3:
        return codes.view(torch.float8_e4m3fn).float()
    if element == _native.E5M2:
        return codes.view(torch.float8_e5m2).float()
    if element == _native.E2M1:
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = torch.tensor(magnitudes + [-x for x in magnitudes], device=codes.device)
        return table[codes.long()]
    return codes.float()

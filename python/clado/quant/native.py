"""What number formats share whose scales, codes and values the kernels compute: one read of a weight serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

import clado_ext
from clado_ext import FormatScale

from ..common import require
from .scaling import Scales, Scaling, held_by


class NativeNumber(ABC):
    """A number format that the kernels know by its name.

    Attributes:
        block: consecutive inputs of an output channel that share a scale and must divide its row; 0: none.
        scales_held: whether its scales are ones that the weight's dtype holds: readers keep them in it.
    """

    block: int
    scales_held: bool

    @property
    @abstractmethod
    def name(self) -> str: ...

    def scales(self, matrix: Tensor, scaling: Scaling) -> Scales:
        """The scales that the settings ask for."""
        return native_scales([self], matrix, scaling)[0]

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        """The nearest code of every element, int8 ``[rows, columns]``."""
        return clado_ext.quantize_formats(matrix, [self.scaled(scales)])[0]

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        """What codes stand for, ``[rows, columns]`` of ``dtype``."""
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        return clado_ext.dequantize_formats(codes[None], [self.scaled(scales)], kernel_dtype)[0].to(dtype)

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        """``decode`` of ``encode``, bit for bit, in the matrix's dtype."""
        return native_nearest([self], matrix, [scales])[0]

    def scaled(self, scales: Scales) -> FormatScale:
        """As the kernels take it."""
        return FormatScale(self.name, scales.scale, scales.group_size, scales.zero_point, scales.tensor_scale)


def native_scales(numbers: Sequence[NativeNumber], matrix: Tensor, scaling: Scaling) -> list[Scales]:
    """The scales of several formats from one read of the matrix.

    Raises:
        CladoError: blocks that do not divide the row.
    """
    columns = matrix.shape[1]
    for number in numbers:
        whole = number.block == 0 or columns % number.block == 0
        must = f"have rows that blocks of {number.block} divide for {number.name}"
        require(whole, "quantize", "weight", must, f"{columns} columns")
    found = clado_ext.format_search(
        matrix, [number.name for number in numbers], scaling.group_size or -1, scaling.scale_steps, scaling.symmetric
    )
    return [
        Scales(
            held_by(matrix.dtype, own.scale) if number.scales_held else own.scale,
            own.zero_point,
            own.group_size,
            own.tensor_scale,
        )
        for number, own in zip(numbers, found, strict=True)
    ]


def native_nearest(numbers: Sequence[NativeNumber], matrix: Tensor, scales: Sequence[Scales]) -> list[Tensor]:
    """:meth:`NativeNumber.nearest` of several formats from one read of the matrix."""
    scaled = [number.scaled(own) for number, own in zip(numbers, scales, strict=True)]
    return list(clado_ext.fake_quant_formats(matrix, scaled)[0])

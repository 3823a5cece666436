"""Number formats: what an element of a weight is stored as. A new one is one class and one line of ``NUMBERS``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import clado_ext
from clado_ext import packed_columns

from ..common import require
from .scaling import Scaling, held_by

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
Stored = dict[str, tuple[tuple[int, int], torch.dtype]]  # {tensor: (shape, dtype)}


def stored_nbytes(stored: Stored) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())


class Scales(NamedTuple):
    """What the codes of a matrix are multiples of.

    Attributes:
        scale: float32 ``[rows, groups]``; of a half-precision weight, values that its dtype holds.
        zero_point: the code of zero, int8 ``[rows, groups]``; None for symmetric quantization.
        group_size: columns that share a scale; -1: the whole row.
    """

    scale: Tensor
    zero_point: Tensor | None
    group_size: int


class Number(Protocol):
    """A number format. A matrix is the ``[rows, columns]`` view of a weight that :meth:`Scaling.matrix` gives.

    Attributes:
        name: as plans and files have it.
        bits: stored bits of an element, scales aside.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    def scales(self, matrix: Tensor, scaling: Scaling) -> Scales:
        """The scales that the settings ask for."""
        ...

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        """The nearest code of every element, int8 ``[rows, columns]``."""
        ...

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        """What codes stand for, ``[rows, columns]`` of ``dtype``."""
        ...

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        """``decode`` of ``encode``, bit for bit, in the matrix's dtype."""
        ...

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        """Shapes and dtypes of the tensors that :meth:`pack` gives for a weight."""
        ...

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Codes and scales as they are stored, by name."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        """Inverse of :meth:`pack`."""
        ...


@dataclass(frozen=True)
class Integer:
    """Codes −2^(bits−1) … 2^(bits−1)−1 with ``w ≈ (code − zero point) · scale``, packed without gaps into int32 words.

    Stored are ``weight_packed``, the codes packed along the columns; ``weight_scale``, float32; and where the settings are
    asymmetric ``weight_zero_point``, packed along the rows.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def scales(self, matrix: Tensor, scaling: Scaling) -> Scales:
        return self.all_scales([self], matrix, scaling)[0]

    @staticmethod
    def all_scales(numbers: Sequence[Integer], matrix: Tensor, scaling: Scaling) -> list[Scales]:
        """The scales of several widths from one read of the matrix."""
        group, steps, bits = scaling.group_size or -1, scaling.scale_steps, [number.bits for number in numbers]
        if scaling.symmetric:
            found = clado_ext.scale_search(matrix, bits, group, steps)
            return [Scales(held_by(matrix.dtype, scale), None, group) for scale in found]
        ranges = clado_ext.range_search(matrix, bits, group, steps)
        return [Scales(held_by(matrix.dtype, scale), zero, group) for scale, zero in zip(*ranges, strict=True)]

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        scale, zero_point = _batched(scales)
        return clado_ext.quantize(matrix, scale, (self.bits,), scales.group_size, zero_point)[0]

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        scale, zero_point = _batched(scales)
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        return clado_ext.dequantize(codes[None], scale, scales.group_size, kernel_dtype, zero_point)[0].to(dtype)

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        return self.all_nearest([self], matrix, [scales])[0]

    @staticmethod
    def all_nearest(numbers: Sequence[Integer], matrix: Tensor, scales: Sequence[Scales]) -> list[Tensor]:
        """:meth:`nearest` of several widths from one read of the matrix."""
        bits, group = [number.bits for number in numbers], scales[0].group_size
        zeros = [own.zero_point for own in scales if own.zero_point is not None]
        scale = torch.stack([own.scale for own in scales])
        values, _ = clado_ext.fake_quant(matrix, scale, bits, group, torch.stack(zeros) if zeros else None)
        return list(values)

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        (rows, columns), groups = scaling.rows_columns(shape), scaling.groups(shape)
        parts: Stored = {
            PACKED: ((rows, packed_columns(columns, self.bits)), torch.int32),
            SCALE: ((rows, groups), torch.float32),
        }
        if not scaling.symmetric:
            parts[ZERO_POINT] = ((packed_columns(rows, self.bits), groups), torch.int32)
        return parts

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        packed = {PACKED: clado_ext.pack(codes, self.bits), SCALE: scales.scale.contiguous()}
        if scales.zero_point is not None:
            packed[ZERO_POINT] = clado_ext.pack(scales.zero_point, self.bits, dim=0)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        rows, columns = scaling.rows_columns(shape)
        zero_point = None if scaling.symmetric else clado_ext.unpack(packed[ZERO_POINT], self.bits, rows, dim=0)
        scales = Scales(packed[SCALE], zero_point, scaling.group_size or -1)
        return clado_ext.unpack(packed[PACKED], self.bits, columns), scales


def _batched(scales: Scales) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as the kernels take them, for one width."""
    return scales.scale[None], None if scales.zero_point is None else scales.zero_point[None]


NUMBERS: dict[str, Number] = {number.name: number for number in map(Integer, range(2, 9))}


def all_scales(numbers: Sequence[Number], matrix: Tensor, scaling: Scaling) -> list[Scales]:
    """:meth:`Number.scales` of a matrix in several formats; integers share a read of it."""
    together = [number for number in numbers if isinstance(number, Integer)]
    found = dict(zip(together, Integer.all_scales(together, matrix, scaling), strict=True)) if together else {}
    return [found[n] if isinstance(n, Integer) else n.scales(matrix, scaling) for n in numbers]


def all_nearest(numbers: Sequence[Number], matrix: Tensor, scales: Sequence[Scales]) -> list[Tensor]:
    """:meth:`Number.nearest` of a matrix in several formats; integers share a read of it."""
    pairs = [(number, own) for number, own in zip(numbers, scales, strict=True) if isinstance(number, Integer)]
    values = Integer.all_nearest([n for n, _ in pairs], matrix, [own for _, own in pairs]) if pairs else []
    rest = iter(values)
    return [
        next(rest) if isinstance(number, Integer) else number.nearest(matrix, own)
        for number, own in zip(numbers, scales, strict=True)
    ]


def integer(bits: int) -> Number:
    """The format of a bit-width.

    Raises:
        CladoError: a width that none has.
    """
    require(f"int{bits}" in NUMBERS, "quantizer", "bits", "lie in 2..8", bits)
    return NUMBERS[f"int{bits}"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in a number format.

    Attributes:
        number: the format.
        shape: of the weight.
        codes: int8 ``[rows, columns]``.
        scales: of the codes.
    """

    number: Number
    shape: tuple[int, ...]
    codes: Tensor
    scales: Scales

    @property
    def scale(self) -> Tensor:
        return self.scales.scale

    @property
    def zero_point(self) -> Tensor | None:
        return self.scales.zero_point

    @staticmethod
    def unpacked(number: Number, shape: tuple[int, ...], packed: Mapping[str, Tensor], scaling: Scaling) -> Quantized:
        """A weight of this shape from the tensors of :meth:`packed`."""
        return Quantized(number, shape, *number.unpack(packed, shape, scaling))

    def held_by(self, dtype: torch.dtype) -> Quantized:
        """With the nearest scales that a model of ``dtype`` holds."""
        return replace(self, scales=self.scales._replace(scale=held_by(dtype, self.scale)))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for."""
        return self.number.decode(self.codes, self.scales, dtype).view(self.shape)

    def packed(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        return self.number.pack(self.codes, self.scales)

    def cpu(self) -> Quantized:
        """The same on the CPU."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Quantized:
        """The same on a device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        scales = self.scales._replace(scale=self.scale.to(device), zero_point=zero_point)
        return Quantized(self.number, self.shape, self.codes.to(device), scales)

"""Floats of few bits: fp8, and fp8 and fp4 in blocks that share a scale; and layers that are kept in 16 bits.

They are symmetric and bring their own granularity. Of the settings ``group_size`` says only whether fp8 has one scale per
tensor (0) or per output channel (anything else), and ``symmetric`` nothing. ``scale_steps`` of 1 takes the standards' scales,
more look for the least squared error among those that the format can store (:func:`clado_ext.format_search`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import clado_ext

from .native import NativeNumber
from .scaling import PACKED, SCALE, Scales, Scaling, Stored

TENSOR_SCALE = "weight_global_scale"


@dataclass(frozen=True)
class Float8(NativeNumber):
    """One float8 per element (``weight_packed``), one float32 scale per output channel, or per tensor (``weight_scale``)."""

    format: str
    dtype: torch.dtype

    bits, block, scales_held = 8, 0, True

    @property
    def name(self) -> str:
        return self.format

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        rows, columns = scaling.rows_columns(shape)
        return {PACKED: ((rows, columns), self.dtype), SCALE: ((rows, 1), torch.float32)}

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {PACKED: codes.contiguous().view(self.dtype), SCALE: scales.scale.contiguous()}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        return packed[PACKED].view(torch.int8), Scales(packed[SCALE], None, -1)


@dataclass(frozen=True)
class Blocks(NativeNumber):
    """Elements of 8 or 4 bits in blocks of consecutive inputs, which share a scale; a row is a whole number of blocks.

    Stored are ``weight_packed``, float8_e4m3fn, or two e2m1 elements in a byte of uint8, the first one low; and ``weight_scale``:
    the exponents of mxfp8 and mxfp4 with 127 added (e8m0, OCP MX 1.0), uint8; of nvfp4 float8_e4m3fn values, beside
    ``weight_global_scale``, the float32 that they are divided by. compressed-tensors has the same.
    """

    format: str
    bits: int
    block: int
    two_levels: bool = False

    scales_held = False

    @property
    def name(self) -> str:
        return self.format

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        rows, columns = scaling.rows_columns(shape)
        groups = columns // self.block
        codes = ((rows, columns), torch.float8_e4m3fn) if self.bits == 8 else ((rows, columns // 2), torch.uint8)
        if not self.two_levels:
            return {PACKED: codes, SCALE: ((rows, groups), torch.uint8)}
        return {
            PACKED: codes,
            SCALE: ((rows, groups), torch.float8_e4m3fn),
            TENSOR_SCALE: ((1, 1), torch.float32),
        }

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        held = codes.contiguous().view(torch.float8_e4m3fn) if self.bits == 8 else _nibbles(codes)
        if scales.tensor_scale is None:
            return {PACKED: held, SCALE: _exponents(scales.scale)}
        below = scales.tensor_scale
        return {
            PACKED: held,
            SCALE: (scales.scale * below).to(torch.float8_e4m3fn),  # exact but for the quotient's last bit
            TENSOR_SCALE: below.view(1, 1),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        held, columns = packed[PACKED], scaling.rows_columns(shape)[1]
        codes = held.view(torch.int8) if self.bits == 8 else _from_nibbles(held, columns)
        if not self.two_levels:
            return codes, Scales(_powers(packed[SCALE]), None, self.block)
        below = packed[TENSOR_SCALE].view(1)
        return codes, Scales(packed[SCALE].float() / below, None, self.block, below)


@dataclass(frozen=True)
class Kept:
    """A layer that is not quantized: its weight in a float dtype of 16 bits (``weight_packed``), saturated, without scales."""

    name: str
    dtype: torch.dtype

    bits, block = 16, 0

    def scales(self, matrix: Tensor, scaling: Scaling) -> Scales:
        return Scales(matrix.new_empty((len(matrix), 0), dtype=torch.float32), None, -1)

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return matrix.float().clamp(-largest, largest).to(self.dtype)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        return self.encode(matrix, scales).to(matrix.dtype)

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        return {PACKED: (scaling.rows_columns(shape), self.dtype)}

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {PACKED: codes}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        codes = packed[PACKED]
        return codes, Scales(codes.new_empty((len(codes), 0), dtype=torch.float32), None, -1)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes 0 … 15 ``[rows, columns]``, two in a byte; the words of four bits without gaps are the same bytes."""
    return clado_ext.pack(codes - 8, 4).view(torch.uint8)


def _from_nibbles(held: Tensor, columns: int) -> Tensor:
    return clado_ext.unpack(held.contiguous().view(torch.int32), 4, columns) + 8


def _exponents(scale: Tensor) -> Tensor:
    """The exponent fields of powers of two; 0 for 2^-127, which is no normal float32, 255 for NaN."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _powers(exponents: Tensor) -> Tensor:
    whole = (exponents.int() << 23).view(torch.float32)
    found = torch.where(exponents == 0, 2.0**-127, whole)
    return torch.where(exponents == 255, torch.nan, found)

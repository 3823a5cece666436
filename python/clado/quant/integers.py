"""Integers of 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import clado_ext
from clado_ext import packed_columns

from .native import NativeNumber
from .scaling import PACKED, SCALE, ZERO_POINT, Scales, Scaling, Stored


@dataclass(frozen=True)
class Integer(NativeNumber):
    """Codes −2^(bits−1) … 2^(bits−1)−1 with ``w ≈ (code − zero point) · scale``, packed without gaps into int32 words.

    Stored are ``weight_packed``, the codes packed along the columns; ``weight_scale``, float32; and where the settings are
    asymmetric ``weight_zero_point``, packed along the rows.
    """

    bits: int

    block = 0
    scales_held = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"

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

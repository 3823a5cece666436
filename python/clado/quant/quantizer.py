"""What a weight becomes at a bit-width: the settings, the bytes, and the quantized values (kernels: clado_ext)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import clado_ext
from clado_ext import packed_columns

from ..common import require

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"


class Quantized(NamedTuple):
    """A weight at one width: codes int8 ``[rows, columns]``, scale float32 and zero point int8 ``[rows, groups]``.

    ``w ≈ (codes - zero_point) * scale``; the zero point is None for symmetric quantization.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Quantizer:
    """How weights are quantized; the same settings hold for every layer of a run.

    Attributes:
        group_size: -1 one scale per output channel; 0 one per tensor; g > 0 one per g consecutive inputs of a channel.
        scale_steps: shrink factors 1, 0.99, 0.98, … tried for the least squared error (95 as in the paper; 1: absmax).
        symmetric: codes are steps around zero; False stores a zero point with every scale.
    """

    group_size: int = -1
    scale_steps: int = 95
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("group_size", "scale_steps"):
            value = getattr(self, name)
            require(type(value) is int, "quantizer", name, "be an integer", repr(value))
        require(self.group_size >= -1, "quantizer", "group_size", "be -1, 0 or positive", self.group_size)
        require(1 <= self.scale_steps <= 99, "quantizer", "scale_steps", "lie in 1..99", self.scale_steps)
        require(isinstance(self.symmetric, bool), "quantizer", "symmetric", "be True or False", repr(self.symmetric))

    def rows_columns(self, shape: Sequence[int]) -> tuple[int, int]:
        """The [rows, columns] view the kernels see: one row per output channel, or one row for the tensor."""
        numel = math.prod(shape)
        return (1, numel) if self.group_size == 0 else (shape[0], numel // shape[0])

    def groups(self, shape: Sequence[int]) -> int:
        """Scales per row."""
        columns = self.rows_columns(shape)[1]
        return math.ceil(columns / self.group_size) if self.group_size > 0 else 1

    def packed_shapes(self, shape: Sequence[int], bits: int) -> dict[str, tuple[int, int]]:
        """Shapes of the tensors that :meth:`pack` gives for a weight; each element takes four bytes."""
        rows, columns = self.rows_columns(shape)
        groups = self.groups(shape)
        shapes = {PACKED: (rows, packed_columns(columns, bits)), SCALE: (rows, groups)}
        return shapes if self.symmetric else {**shapes, ZERO_POINT: (packed_columns(rows, bits), groups)}

    def storage_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Bytes of one packed layer: int32 words of codes, float32 scales, int32 words of zero points, padding included."""
        return 4 * sum(math.prod(part) for part in self.packed_shapes(shape, bits).values())

    def scales(self, weight: Tensor, bits: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Scales ``[B, rows, groups]`` float32 of a weight at every width, and zero points int8, None when symmetric."""
        matrix = self._matrix(weight)
        if self.symmetric:
            return clado_ext.scale_search(matrix, bits, self._group_size, self.scale_steps), None
        return clado_ext.range_search(matrix, bits, self._group_size, self.scale_steps)

    def fake_quant(self, weight: Tensor, bits: Sequence[int]) -> Tensor:
        """Quantized and dequantized values ``[B, *weight.shape]`` in the weight's dtype (float64 weights as float32)."""
        scale, zero_point = self.scales(weight, bits)
        values, _ = clado_ext.fake_quant(self._matrix(weight), scale, bits, self._group_size, zero_point)
        return values.view(len(bits), *weight.shape).to(weight.dtype)

    def quantize(self, weight: Tensor, bits: int) -> Quantized:
        """Integer codes of a weight at one width."""
        scale, zero_point = self.scales(weight, (bits,))
        codes = clado_ext.quantize(self._matrix(weight), scale, (bits,), self._group_size, zero_point)
        return Quantized(codes[0], scale[0], None if zero_point is None else zero_point[0])

    def dequantize(self, quantized: Quantized, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of :meth:`quantize`, bit for bit what :meth:`fake_quant` gives."""
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        zero_point = None if quantized.zero_point is None else quantized.zero_point[None]
        values = clado_ext.dequantize(
            quantized.codes[None], quantized.scale[None], self._group_size, kernel_dtype, zero_point
        )
        return values.view(tuple(shape)).to(dtype)

    def pack(self, weight: Tensor, bits: int) -> dict[str, Tensor]:
        """A weight at one width as it is stored, by name.

        ``weight_packed``: int32 words of codes, packed along the columns; ``weight_scale``: float32; ``weight_zero_point``
        (asymmetric): int32 words of zero points, packed along the rows. Shapes: :meth:`packed_shapes`.
        """
        codes, scale, zero_point = self.quantize(weight, bits)
        packed = {PACKED: clado_ext.pack(codes, bits), SCALE: scale.contiguous()}
        return packed if zero_point is None else {**packed, ZERO_POINT: clado_ext.pack(zero_point, bits, dim=0)}

    def unpack(self, packed: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> Quantized:
        """What :meth:`quantize` gave, from the tensors of :meth:`pack`."""
        rows, columns = self.rows_columns(shape)
        zero_point = None if self.symmetric else clado_ext.unpack(packed[ZERO_POINT], bits, rows, dim=0)
        return Quantized(clado_ext.unpack(packed[PACKED], bits, columns), packed[SCALE], zero_point)

    @property
    def _group_size(self) -> int:
        return self.group_size or -1

    def _matrix(self, weight: Tensor) -> Tensor:
        matrix = weight.detach().reshape(self.rows_columns(weight.shape))
        return matrix.float() if matrix.dtype == torch.float64 else matrix

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

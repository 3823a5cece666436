"""The settings weights are quantized with, and what one weight becomes under them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common import require
from .numbers import Quantized, Stored, all_nearest, all_scales, integer


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

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as the kernels see it: ``[rows, columns]``, float64 as float32."""
        matrix = weight.detach().reshape(self.rows_columns(weight.shape))
        return matrix.float() if matrix.dtype == torch.float64 else matrix

    def stored(self, shape: Sequence[int], bits: int) -> Stored:
        """{name: (shape, dtype)} of the tensors that :meth:`pack` gives for a weight."""
        return integer(bits).stored(tuple(shape), self)

    def packed_shapes(self, shape: Sequence[int], bits: int) -> dict[str, tuple[int, int]]:
        """Their shapes alone."""
        return {name: found for name, (found, _) in self.stored(shape, bits).items()}

    def storage_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Bytes of one packed layer: int32 words of codes, float32 scales, int32 words of zero points, padding included."""
        return sum(math.prod(part) * dtype.itemsize for part, dtype in self.stored(shape, bits).values())

    def scales(self, weight: Tensor, bits: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Scales ``[B, rows, groups]`` float32 of a weight at every width, and zero points int8, None when symmetric."""
        matrix = self.matrix(weight)
        found = all_scales([integer(width) for width in bits], matrix, self)
        zero_points = [scales.zero_point for scales in found if scales.zero_point is not None]
        return torch.stack([scales.scale for scales in found]), torch.stack(zero_points) if zero_points else None

    def fake_quant(self, weight: Tensor, bits: Sequence[int]) -> Tensor:
        """Quantized and dequantized values ``[B, *weight.shape]`` in the weight's dtype (float64 weights as float32)."""
        matrix = self.matrix(weight)
        numbers = [integer(width) for width in bits]
        values = all_nearest(numbers, matrix, all_scales(numbers, matrix, self))
        return torch.stack(values).view(len(bits), *weight.shape).to(weight.dtype)

    def quantize(self, weight: Tensor, bits: int) -> Quantized:
        """Integer codes of a weight at one width."""
        matrix, number = self.matrix(weight), integer(bits)
        scales = number.scales(matrix, self)
        return Quantized(number, tuple(weight.shape), number.encode(matrix, scales), scales)

    def pack(self, weight: Tensor, bits: int) -> dict[str, Tensor]:
        """A weight at one width as it is stored, by name.

        ``weight_packed``: int32 words of codes, packed along the columns; ``weight_scale``: float32; ``weight_zero_point``
        (asymmetric): int32 words of zero points, packed along the rows. Shapes: :meth:`packed_shapes`.
        """
        return self.quantize(weight, bits).packed()

    def unpack(self, packed: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> Quantized:
        """What :meth:`quantize` gave, from the tensors of :meth:`pack`."""
        number, known = integer(bits), tuple(shape)
        return Quantized(number, known, *number.unpack(packed, known, self))

    def dequantize(self, quantized: Quantized, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of :meth:`quantize`, bit for bit what :meth:`fake_quant` gives."""
        return quantized.values(dtype).view(tuple(shape))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

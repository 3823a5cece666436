"""The settings weights are quantized with, and what one weight becomes under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .numbers import Quantized, all_nearest, all_scales, integer
from .scaling import Scaling, Stored, stored_nbytes


@dataclass(frozen=True)
class Quantizer(Scaling):
    """How weights are quantized: the settings of :class:`Scaling`, and integers under them by their bits."""

    def stored(self, shape: Sequence[int], bits: int) -> Stored:
        """{name: (shape, dtype)} of the tensors that :meth:`pack` gives for a weight."""
        return integer(bits).stored(tuple(shape), self)

    def packed_shapes(self, shape: Sequence[int], bits: int) -> dict[str, tuple[int, int]]:
        """Their shapes alone."""
        return {name: found for name, (found, _) in self.stored(shape, bits).items()}

    def storage_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Bytes of one packed layer: int32 words of codes, float32 scales, int32 words of zero points, padding included."""
        return stored_nbytes(self.stored(shape, bits))

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
        return Quantized.unpacked(integer(bits), tuple(shape), packed, self)

    def dequantize(self, quantized: Quantized, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of :meth:`quantize`, bit for bit what :meth:`fake_quant` gives."""
        return quantized.values(dtype).view(tuple(shape))

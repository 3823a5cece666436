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

from .errors import require

PACKED, SCALE = "weight_packed", "weight_scale"


class Quantized(NamedTuple):
    """A weight at one width: codes int8 ``[rows, columns]``, scale float32 ``[rows, groups]``."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Quantizer:
    """How weights are quantized; the same settings hold for every layer of a run.

    Attributes:
        group_size: -1 one scale per output channel; 0 one per tensor; g > 0 one per g consecutive inputs of a channel.
        scale_steps: shrink factors 1, 0.99, 0.98, … tried for the least squared error (95 as in the paper; 1: absmax).
    """

    group_size: int = -1
    scale_steps: int = 95

    def __post_init__(self) -> None:
        require(self.group_size >= -1, "quantizer", "group_size", "be -1, 0 or positive", self.group_size)
        require(1 <= self.scale_steps <= 99, "quantizer", "scale_steps", "lie in 1..99", self.scale_steps)

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
        return {PACKED: (rows, packed_columns(columns, bits)), SCALE: (rows, self.groups(shape))}

    def storage_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Bytes of one packed layer: int32 words of codes, rows padded to a whole word, and float32 scales."""
        return 4 * sum(math.prod(part) for part in self.packed_shapes(shape, bits).values())

    def scales(self, weight: Tensor, bits: Sequence[int]) -> Tensor:
        """Scales ``[B, rows, groups]`` float32 of a weight at every width."""
        return clado_ext.scale_search(self._matrix(weight), bits, self._group_size, self.scale_steps)

    def fake_quant(self, weight: Tensor, bits: Sequence[int]) -> Tensor:
        """Quantized and dequantized values ``[B, *weight.shape]`` in the weight's dtype (float64 weights as float32)."""
        matrix = self._matrix(weight)
        values, _ = clado_ext.fake_quant(matrix, self.scales(weight, bits), bits, self._group_size)
        return values.view(len(bits), *weight.shape).to(weight.dtype)

    def quantize(self, weight: Tensor, bits: int) -> Quantized:
        """Integer codes of a weight at one width."""
        matrix, scales = self._matrix(weight), self.scales(weight, (bits,))
        return Quantized(clado_ext.quantize(matrix, scales, (bits,), self._group_size)[0], scales[0])

    def dequantize(self, quantized: Quantized, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of :meth:`quantize`, bit for bit what :meth:`fake_quant` gives."""
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        codes, scale = (part.unsqueeze(0) for part in quantized)
        values = clado_ext.dequantize(codes, scale, self._group_size, kernel_dtype)
        return values.view(tuple(shape)).to(dtype)

    def pack(self, weight: Tensor, bits: int) -> dict[str, Tensor]:
        """A weight at one width as it is stored: int32 words of codes and float32 scales, by name."""
        quantized = self.quantize(weight, bits)
        return {PACKED: clado_ext.pack(quantized.codes, bits), SCALE: quantized.scale.contiguous()}

    def unpack(self, packed: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> Quantized:
        """What :meth:`quantize` gave, from the tensors of :meth:`pack`."""
        return Quantized(clado_ext.unpack(packed[PACKED], bits, self.rows_columns(shape)[1]), packed[SCALE])

    @property
    def _group_size(self) -> int:
        return self.group_size or -1

    def _matrix(self, weight: Tensor) -> Tensor:
        matrix = weight.detach().reshape(self.rows_columns(weight.shape))
        return matrix.float() if matrix.dtype == torch.float64 else matrix

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

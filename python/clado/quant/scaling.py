"""How weights are scaled: the settings, the matrix that the kernels see of a weight under them, and the scales it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import require

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
Stored = dict[str, tuple[tuple[int, int], torch.dtype]]  # {tensor: (shape, dtype)}


def stored_nbytes(stored: Stored) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())


class Scales(NamedTuple):
    """What the codes of a matrix are multiples of.

    Attributes:
        scale: float32 ``[rows, groups]``; of integers and fp8 in a half-precision weight, values that its dtype holds.
        zero_point: the code of zero, int8 ``[rows, groups]``; None for symmetric quantization.
        group_size: columns that share a scale; -1: the whole row.
        tensor_scale: of nvfp4, float32 ``[1]``: a block's scale times it is the float8_e4m3 that is stored; None of others.
    """

    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    tensor_scale: Tensor | None = None

    def to(self, device: torch.device, copy: bool = False) -> Scales:
        """The same on a device; ``copy``: in tensors of their own."""
        scale, zero_point, below = (
            None if part is None else part.to(device, copy=copy)
            for part in (self.scale, self.zero_point, self.tensor_scale)
        )
        assert scale is not None
        return Scales(scale, zero_point, self.group_size, below)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.scale, self.zero_point, self.tensor_scale) if part is not None)


@dataclass(frozen=True)
class Scaling:
    """How weights are scaled; the same settings hold for every layer of a run.

    Attributes:
        group_size: -1 one scale per output channel; 0 one per tensor; g > 0 one per g consecutive inputs of a channel. fp8 has
            one per channel for g > 0 too; blocks of mx and nvfp4 formats are what their standards say.
        scale_steps: shrink factors 1, 0.99, 0.98, … tried for the least squared error (95 as in the paper; 1: absmax). Blocks of
            mx and nvfp4 try what they can store in that range and up to twice the largest (1: as their standards say).
        symmetric: codes are steps around zero; False stores a zero point with every scale of an integer. Floats are symmetric.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def held_by(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """The nearest scales that weights of ``dtype`` allow, float32 and positive.

    Readers of half-precision models keep the scales in the model's dtype. A scale that it does not hold would become another
    weight there than the one that was measured.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return scale
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest one above zero
    return scale.to(dtype).float().clamp(min=least)

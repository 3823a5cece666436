"""How weights are scaled: the settings, and the matrix that the kernels see of a weight under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common import require


@dataclass(frozen=True)
class Scaling:
    """How weights are scaled; the same settings hold for every layer of a run.

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

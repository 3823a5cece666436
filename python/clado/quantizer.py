"""What a weight becomes at a bit-width: the settings, the bytes, and the quantized values (kernels: clado_ext)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clado_ext import packed_columns

from .errors import require


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

    def storage_bytes(self, shape: Sequence[int], bits: int) -> int:
        """Bytes of one exported layer: packed int32 words of every row and float32 scales."""
        rows, columns = self.rows_columns(shape)
        return 4 * rows * (packed_columns(columns, bits) + self.groups(shape))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

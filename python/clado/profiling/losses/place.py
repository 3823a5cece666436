"""Where a loss finds what it compares: the shape of an output, its classes, and the positions that are looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Of one output of the model.

    Attributes:
        shape: of the output of a sample.
        dim: of the output with the samples in front, holds classes or what is one vector; 0: every value is by itself.
        ignore_index: label that counts nothing.
        class_weights: what a position counts by its label; None: all alike.
        chosen: int64 ``[N, P]``, the positions that are looked at; None: all.
    """

    shape: tuple[int, ...]
    dim: int = 0
    ignore_index: int = -100
    class_weights: tuple[float, ...] | None = None
    chosen: Tensor | None = None

    @property
    def positions(self) -> int:
        """Of a sample: vectors, or values where each is by itself."""
        return math.prod(self.shape) // self.vector

    @property
    def vector(self) -> int:
        """Values of a position."""
        return self.shape[self.dim - 1] if self.dim else 1

    @property
    def without_dim(self) -> tuple[int, ...]:
        """The shape of a sample's labels."""
        return tuple(size for d, size in enumerate(self.shape, 1) if d != self.dim)

    def counted(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[N, R]`` with zero where they are to be ignored, and what each counts in a sample's mean; None: all alike."""
        valid = targets != self.ignore_index
        if self.class_weights is None and bool(valid.all()):
            return targets, None
        labels = torch.where(valid, targets, 0)
        share = valid.double() / valid.sum(1, keepdim=True).clamp(min=1)
        if self.class_weights is not None:
            share = share * share.new_tensor(self.class_weights)[labels]
        return labels, share

    def of_positions(self, values: Tensor) -> Tensor:
        """Of ``[N, R]`` those that are looked at."""
        return values if self.chosen is None else values.gather(1, self.chosen.to(values.device))


def chosen_positions(count: int, wanted: int, seeds: Any) -> Tensor:
    """``[N, wanted]`` of so many positions, ascending, of every sample others, the same for the same seed."""
    rows = [
        torch.randperm(count, generator=torch.Generator().manual_seed(int(s) & (2**63 - 1)))[:wanted] for s in seeds
    ]
    return torch.stack([row.sort().values for row in rows])

"""Partial sums of a run over groups of as many chunks each: what the noise in the matrix is told from.

There are never more than ``GROUPS`` of them: a chunk that would begin another joins neighbours first. So the groups depend on
nothing but how many chunks there are, and memory on nothing but the candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import require
from .sums import Sums

GROUPS = 16


class Groups:
    """Sums of ΔL (on the diagonal) and Ω (above it) over groups of chunks.

    Attributes:
        sums: float64 ``[GROUPS, V, V]``; the last group that holds anything may be short of chunks.
        chunks: how many were added.
    """

    def __init__(self, candidates: int) -> None:
        self.sums = torch.zeros(GROUPS, candidates, candidates, dtype=torch.float64)
        self.chunks = 0

    @property
    def each(self) -> int:
        """Chunks of a group: the least power of two with which the groups suffice."""
        return 1 << max(0, (-(-self.chunks // GROUPS) - 1).bit_length())

    @property
    def begun(self) -> Tensor:
        """``[G, V, V]``: those that hold a chunk."""
        return self.sums[: -(-self.chunks // self.each)]

    def add(self, part: Sums) -> None:
        """Add the next chunk."""
        before = self.each
        self.chunks += 1
        if self.each > before:
            self.sums[: GROUPS // 2] = self.sums[0::2] + self.sums[1::2]
            self.sums[GROUPS // 2 :] = 0
        group = self.sums[(self.chunks - 1) // self.each]
        group += part.pair.triu(1)
        group.diagonal().add_(part.loss)

    @staticmethod
    def of(begun: Tensor, chunks: int) -> Groups:
        """From what a file holds."""
        groups = Groups(begun.shape[-1])
        groups.chunks = chunks
        require(groups.begun.shape == begun.shape, "profile", "output_dir", "hold whole groups", tuple(begun.shape))
        groups.begun.copy_(begun)
        return groups


def group_bytes(candidates: int) -> int:
    return 8 * GROUPS * candidates**2

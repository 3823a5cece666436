"""Roundings: how a scaled weight becomes codes. A new one is one class and one line of ``ROUNDINGS``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .numbers import Number, Scales, all_nearest


class Rounding(ABC):
    """A way to choose codes under scales that are fixed.

    Attributes:
        needs_moments: whether it needs the second moments Σ x xᵀ of the layer's input.
    """

    needs_moments: bool

    @abstractmethod
    def codes(
        self, matrix: Tensor, numbers: Sequence[Number], scales: Sequence[Scales], moments: Tensor | None
    ) -> list[Tensor]:
        """The codes of a ``[rows, columns]`` matrix in several formats, each int8 of that shape.

        Args:
            matrix: the weight as :meth:`Quantizer.matrix` gives it.
            numbers: the formats.
            scales: of each format for this matrix.
            moments: of the layer's input; None where the rounding needs none.
        """

    def values(
        self, matrix: Tensor, numbers: Sequence[Number], scales: Sequence[Scales], moments: Tensor | None
    ) -> list[Tensor]:
        """What :meth:`codes` stand for, in the matrix's dtype."""
        found = zip(numbers, self.codes(matrix, numbers, scales, moments), scales, strict=True)
        return [number.decode(codes, own, matrix.dtype) for number, codes, own in found]


class Nearest(Rounding):
    """Every element by itself, half to even."""

    needs_moments = False

    def codes(
        self, matrix: Tensor, numbers: Sequence[Number], scales: Sequence[Scales], moments: Tensor | None
    ) -> list[Tensor]:
        return [number.encode(matrix, own) for number, own in zip(numbers, scales, strict=True)]

    def values(
        self, matrix: Tensor, numbers: Sequence[Number], scales: Sequence[Scales], moments: Tensor | None
    ) -> list[Tensor]:
        return all_nearest(numbers, matrix, scales)  # one read of the weight for all, instead of two for each


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest()}

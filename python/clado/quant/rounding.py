"""Roundings: how a scaled weight becomes codes. A new one is one class and one line of ``ROUNDINGS``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .numbers import Number, Scales


class Rounding(ABC):
    """A way to choose codes under scales that are fixed.

    Attributes:
        needs_moments: whether it needs the second moments Σ x xᵀ of the layer's input.
    """

    needs_moments: bool

    @abstractmethod
    def codes(self, matrix: Tensor, scales: Scales, number: Number, moments: Tensor | None) -> Tensor:
        """The codes of a ``[rows, columns]`` matrix, int8 of that shape.

        Args:
            matrix: the weight as :meth:`Quantizer.matrix` gives it.
            scales: of ``number`` for this matrix.
            number: the format of the codes.
            moments: of the layer's input; None where the rounding needs none.
        """

    def values(self, matrix: Tensor, scales: Scales, number: Number, moments: Tensor | None) -> Tensor:
        """What :meth:`codes` stand for, in the matrix's dtype."""
        return number.decode(self.codes(matrix, scales, number, moments), scales, matrix.dtype)


class Nearest(Rounding):
    """Every element by itself, half to even."""

    needs_moments = False

    def codes(self, matrix: Tensor, scales: Scales, number: Number, moments: Tensor | None) -> Tensor:
        return number.encode(matrix, scales)

    def values(self, matrix: Tensor, scales: Scales, number: Number, moments: Tensor | None) -> Tensor:
        return number.nearest(matrix, scales)  # one pass over the weight instead of two


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest()}

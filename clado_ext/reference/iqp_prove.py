"""Twin of clado_ext.iqp_prove: the bound is the optimum itself, found by trying every choice."""

from torch import Tensor

from .iqp_search import iqp_search


def iqp_prove(matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The best feasible choice and the largest valid bound; (-1 throughout, infinity) where nothing is feasible."""
    return iqp_search(matrix, starts, rows, limits)

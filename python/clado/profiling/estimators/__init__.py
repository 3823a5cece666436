"""Estimators: a file each, and a line here that names it. What one needs is in its :class:`Estimator`; nobody asks by name."""

from .base import Estimator, Later, Passes, joined
from .closed_form import ADDITIVE, DIAGONAL
from .gradient import GRADIENT
from .pairs import CORRECTED, EXACT

ESTIMATORS: dict[str, Estimator] = {
    "diagonal": DIAGONAL,
    "additive": ADDITIVE,
    "gradient": GRADIENT,
    "corrected": CORRECTED,
    "exact": EXACT,
}

__all__ = ["ESTIMATORS", "Estimator", "Later", "Passes", "joined"]

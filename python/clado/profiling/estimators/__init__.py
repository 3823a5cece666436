"""Estimators: a file each, and a line here that names it. What one needs is in its :class:`Estimator`; nobody asks by name."""

from .base import Estimator, Later, Passes
from .closed_form import DIAGONAL, LOGIT
from .gradient import GRADIENT
from .pairs import CORRECTED, EXACT

ESTIMATORS: dict[str, Estimator] = {
    "diagonal": DIAGONAL,
    "logit": LOGIT,
    "gradient": GRADIENT,
    "corrected": CORRECTED,
    "exact": EXACT,
}

__all__ = ["ESTIMATORS", "Estimator", "Later", "Passes"]

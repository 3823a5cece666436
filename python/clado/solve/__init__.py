"""From a sensitivity matrix and budgets to a plan with a certificate."""

from .budgets import LinearConstraint
from .solver import Solver, solve

__all__ = ["LinearConstraint", "Solver", "solve"]

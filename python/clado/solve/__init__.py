"""From a sensitivity matrix and budgets to a plan with a certificate."""

from .budgets import LinearConstraint
from .pareto import pareto
from .solver import Solver, solve

__all__ = ["LinearConstraint", "Solver", "pareto", "solve"]

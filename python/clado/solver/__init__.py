"""From a sensitivity matrix and budgets to a plan with a certificate."""

from .budgets import LinearConstraint, read_latency
from .objectives import NAMES as OBJECTIVES
from .objectives import objective_matrix
from .pareto import pareto
from .session import Solver, given_plan, solve
from .shortlist import shortlist

__all__ = [
    "OBJECTIVES",
    "LinearConstraint",
    "Solver",
    "given_plan",
    "objective_matrix",
    "pareto",
    "read_latency",
    "shortlist",
    "solve",
]

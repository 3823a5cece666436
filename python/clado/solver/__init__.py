"""From a sensitivity matrix and budgets to a plan with a certificate.

Other packages solve, list and judge plans; programs, bounds and solvers stay inside.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .constraints import LinearConstraint, read_constraints, read_latency
    from .contenders import least_alone, shortlist
    from .frontier import pareto
    from .objectives import NAMES as OBJECTIVES
    from .objectives import negative_mass, objective_matrix
    from .options import AXES, BUDGETS, INVERSE, SIZE, SolveOptions, least_loss_only
    from .regret import regret_bounds
    from .session import Solver, given_plan, solve
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "AXES",
    "BUDGETS",
    "INVERSE",
    "OBJECTIVES",
    "SIZE",
    "LinearConstraint",
    "SolveOptions",
    "Solver",
    "given_plan",
    "least_alone",
    "least_loss_only",
    "negative_mass",
    "objective_matrix",
    "pareto",
    "read_constraints",
    "read_latency",
    "regret_bounds",
    "shortlist",
    "solve",
]

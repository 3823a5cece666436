"""Mixed-precision quantization of vision models with layer interactions and a certified optimum."""

from .errors import CladoError
from .plan import Plan
from .quantizer import Quantizer
from .sensitivity import Layer, Sensitivity
from .solve import LinearConstraint, Solver, pareto, solve

__all__ = ["CladoError", "Layer", "LinearConstraint", "Plan", "Quantizer", "Sensitivity", "Solver", "pareto", "solve"]

"""Mixed-precision quantization of vision models with layer interactions and a certified optimum."""

from .errors import CladoError
from .plan import Plan
from .quantizer import Quantizer
from .sensitivity import Layer, Sensitivity
from .solve import solve

__all__ = ["CladoError", "Layer", "Plan", "Quantizer", "Sensitivity", "solve"]

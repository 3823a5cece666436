"""Mixed-precision quantization of vision models with layer interactions and a certified optimum."""

from .errors import CladoError
from .quantizer import Quantizer
from .sensitivity import Layer, Sensitivity

__all__ = ["CladoError", "Layer", "Quantizer", "Sensitivity"]

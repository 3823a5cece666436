"""What a weight and a layer's input become: layers, candidates, number formats, rounding.

Other packages ask for quantized weights here and call no quantizing kernel themselves.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .activations import ActivationRanges, calibrate, quantize_activations
    from .candidates import KEPT, Candidates, Scheme, candidates_of, check_bits, inputs_kept, scheme_names, stored_bytes
    from .layers import Layer, ignored, layer_name, modules, storage
    from .numbers import NUMBERS, PACKED, SCALE, ZERO_POINT, Number, Quantized
    from .quantizer import Quantizer
    from .rounding import ROUNDINGS, Rounding
    from .weights import codes, variants
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "KEPT",
    "NUMBERS",
    "PACKED",
    "ROUNDINGS",
    "SCALE",
    "ZERO_POINT",
    "ActivationRanges",
    "Candidates",
    "Layer",
    "Number",
    "Quantized",
    "Quantizer",
    "Rounding",
    "Scheme",
    "calibrate",
    "candidates_of",
    "check_bits",
    "codes",
    "ignored",
    "inputs_kept",
    "layer_name",
    "modules",
    "quantize_activations",
    "scheme_names",
    "storage",
    "stored_bytes",
    "variants",
]

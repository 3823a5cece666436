"""What a weight and a layer's input become: layers, candidates, number formats, rounding.

Other packages ask for quantized weights here and call no quantizing kernel themselves.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .activations import Activations, calibrate, quantize_activations
    from .candidates import KEPT, Candidates, Scheme, candidates_of, check_bits, inputs_kept, scheme_names, stored_bytes
    from .layers import Layer, ignored, layer_name, storage
    from .quantizer import PACKED, SCALE, ZERO_POINT, Quantizer
    from .weights import quantized_variants
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "KEPT",
    "PACKED",
    "SCALE",
    "ZERO_POINT",
    "Activations",
    "Candidates",
    "Layer",
    "Quantizer",
    "Scheme",
    "calibrate",
    "candidates_of",
    "check_bits",
    "ignored",
    "inputs_kept",
    "layer_name",
    "quantize_activations",
    "quantized_variants",
    "scheme_names",
    "storage",
    "stored_bytes",
]

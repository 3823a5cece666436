"""What a weight and a layer's input become: layers, candidates, number formats, rounding.

Other packages ask for quantized weights here and call no quantizing kernel themselves.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .activations import Activations, calibrate, quantize_activations
    from .candidates import check_bits, same_layer
    from .layers import Layer, ignored, layer_name, storage
    from .quantizer import PACKED, SCALE, ZERO_POINT, Quantizer
    from .weights import quantized_variants
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "PACKED",
    "SCALE",
    "ZERO_POINT",
    "Activations",
    "Layer",
    "Quantizer",
    "calibrate",
    "check_bits",
    "ignored",
    "layer_name",
    "quantize_activations",
    "quantized_variants",
    "same_layer",
    "storage",
]

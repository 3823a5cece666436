"""What a weight and a layer's input become: layers, candidates, number formats, rounding.

Other packages ask for quantized weights here and call no quantizing kernel themselves.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .activations import (
        ActivationRanges,
        calibrate,
        calibrate_inputs,
        input_rounding,
        quantize_activations,
        round_inputs,
        with_rounded_inputs,
    )
    from .calls import Call, Calls, Readers, announce
    from .candidates import KEPT, Candidates, Scheme, all_plain, candidates_of, check_bits, scheme_names, stored_bytes
    from .floats import TENSOR_SCALE, Blocks, Float8, Kept
    from .folding import folded
    from .inputs import INPUTS, DynamicInteger, InputFormat, InputRounding, StaticInteger, Variant
    from .integers import Integer
    from .layers import (
        Layer,
        applied_as,
        groups_of,
        has_rows,
        ignored,
        in_rows,
        layer_name,
        modules,
        positions,
        storage,
    )
    from .learned import LearnedWeight
    from .numbers import NUMBERS, Number, Quantized
    from .quantizer import Quantizer
    from .rounded import Rounded, RoundedBy, joined, parted
    from .rounding import ROUNDINGS, Rounding
    from .scaling import PACKED, SCALE, ZERO_POINT, held_by, stored_nbytes
    from .weights import codes, compensated, optimism, round_weights, variants
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "INPUTS",
    "KEPT",
    "NUMBERS",
    "PACKED",
    "ROUNDINGS",
    "SCALE",
    "TENSOR_SCALE",
    "ZERO_POINT",
    "ActivationRanges",
    "Blocks",
    "Call",
    "Calls",
    "Candidates",
    "DynamicInteger",
    "Float8",
    "InputFormat",
    "InputRounding",
    "Integer",
    "Kept",
    "Layer",
    "LearnedWeight",
    "Number",
    "Quantized",
    "Quantizer",
    "Readers",
    "Rounded",
    "RoundedBy",
    "Rounding",
    "Scheme",
    "StaticInteger",
    "Variant",
    "all_plain",
    "announce",
    "applied_as",
    "calibrate",
    "calibrate_inputs",
    "candidates_of",
    "check_bits",
    "codes",
    "compensated",
    "folded",
    "groups_of",
    "has_rows",
    "held_by",
    "ignored",
    "in_rows",
    "input_rounding",
    "joined",
    "layer_name",
    "modules",
    "optimism",
    "parted",
    "positions",
    "quantize_activations",
    "round_inputs",
    "round_weights",
    "scheme_names",
    "storage",
    "stored_bytes",
    "stored_nbytes",
    "variants",
    "with_rounded_inputs",
]

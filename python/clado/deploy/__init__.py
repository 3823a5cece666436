"""From a plan to weights: in a copy of the model, packed in memory, timed, or written in a file format that others read.

Other packages apply, export and load; a file format is one file of ``formats``.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .applied import adapted, apply, check_fit
    from .exporter import Exported, export, load, predicted_bytes, verify
    from .formats import FORMATS
    from .formats.safetensors import MODEL_FILE
    from .latency import time_layers, write_latency
    from .nn import QuantConv2d, QuantLinear, pack_model, packed_bytes
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "FORMATS",
    "MODEL_FILE",
    "Exported",
    "QuantConv2d",
    "QuantLinear",
    "adapted",
    "apply",
    "check_fit",
    "export",
    "load",
    "pack_model",
    "packed_bytes",
    "predicted_bytes",
    "time_layers",
    "verify",
    "write_latency",
]

"""A model that runs under many perturbations at once: captured as a graph, or by whole forwards.

Other packages get a finished runner and see no more of it than the :class:`Runner` protocol; nodes and states stay inside.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .blocks import Block, Blocks, Live
    from .forward import ForwardStep, check_model
    from .moments import PairSums, Use
    from .open import in_precision, open_runner
    from .precision import LOW_PRECISIONS, PRECISIONS, common_dtype, converted, full_precision
    from .runner import Objective, Runner, Variants
    from .streams import first_stream
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "LOW_PRECISIONS",
    "PRECISIONS",
    "Block",
    "Blocks",
    "ForwardStep",
    "Live",
    "Objective",
    "PairSums",
    "Runner",
    "Use",
    "Variants",
    "check_model",
    "common_dtype",
    "converted",
    "first_stream",
    "full_precision",
    "in_precision",
    "open_runner",
]

"""A model that runs under many perturbations at once: captured as a graph, or by whole forwards.

Other packages get a finished runner and see no more of it than the :class:`Runner` protocol; nodes and states stay inside.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .capture import Captured, NotCapturable
    from .carried import LOW_PRECISIONS, CarriedExecutor
    from .executor import Executor, Runner, State
    from .forward import (
        ForwardStep,
        check_finite,
        check_forward,
        check_module,
        check_output,
        first_of_batch,
        plain_call,
    )
    from .precision import PRECISIONS, converted, full_precision
    from .whole_forwards import WholeExecutor
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "LOW_PRECISIONS",
    "PRECISIONS",
    "Captured",
    "CarriedExecutor",
    "Executor",
    "ForwardStep",
    "NotCapturable",
    "Runner",
    "State",
    "WholeExecutor",
    "check_finite",
    "check_forward",
    "check_module",
    "check_output",
    "converted",
    "first_of_batch",
    "full_precision",
    "plain_call",
]

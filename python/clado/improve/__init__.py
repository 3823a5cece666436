"""Where the measured loss decides: true losses of plans, exact pairs of a plan, the matrix around a plan.

Other packages call the functions and read a :class:`Score`.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .corrector import correct
    from .finisher import finish
    from .refiner import refine
    from .true_loss import SURE, Score, evaluate, loss_increases, rerank, standard_error, standing
    from .within_drop import smallest_within
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "SURE",
    "Score",
    "correct",
    "evaluate",
    "finish",
    "loss_increases",
    "refine",
    "rerank",
    "smallest_within",
    "standard_error",
    "standing",
]

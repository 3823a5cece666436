"""What one stage hands to the next, as files without pickle: the sensitivity matrix and the plan.

Other packages read and build both; how they lie in a file is known here alone.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .optimism import optimism_of, pair_factors, uncorrected, without_optimism
    from .plan import PLAN_FILE, ChosenOn, Plan, minimized_in_words
    from .provenance import Provenance, unit_of
    from .rounded_file import read_rounded, rounded_name, save_held
    from .sensitivity import MATRIX_FILE, Sensitivity
    from .stability import Stability, percent
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "MATRIX_FILE",
    "PLAN_FILE",
    "ChosenOn",
    "Plan",
    "Provenance",
    "Sensitivity",
    "Stability",
    "minimized_in_words",
    "optimism_of",
    "pair_factors",
    "percent",
    "read_rounded",
    "rounded_name",
    "save_held",
    "uncorrected",
    "unit_of",
    "without_optimism",
]

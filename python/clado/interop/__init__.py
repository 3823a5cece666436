"""Other tools: their scores become a matrix, a plan becomes their configuration, and they run on our kernels.

Other packages call the readers and :data:`RECIPES`; foreign pickles are taken apart inside and nothing of them gets out.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .backends.patches import Used
    from .backends.switch import BACKENDS, backend
    from .importers import read_clado, read_matrix, read_modelopt, read_scores, read_sizes
    from .recipes import RECIPES, modelopt, plain, quanto, torchao, torchao_json
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "BACKENDS",
    "RECIPES",
    "Used",
    "backend",
    "modelopt",
    "plain",
    "quanto",
    "read_clado",
    "read_matrix",
    "read_modelopt",
    "read_scores",
    "read_sizes",
    "torchao",
    "torchao_json",
]

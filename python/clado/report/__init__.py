"""What a run directory shows to people: one self-contained page, or single figures.

Other packages write them; how a figure looks is decided inside.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .contents import Contents, gather
    from .measured import agreement, measure, random_plans, uniform_plans
    from .page import write_figures, write_report
    from .plan_figures import frontier_figure
    from .style import check_path, save_figure
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "Contents",
    "agreement",
    "check_path",
    "frontier_figure",
    "gather",
    "measure",
    "random_plans",
    "save_figure",
    "uniform_plans",
    "write_figures",
    "write_report",
]

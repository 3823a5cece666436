"""What a run directory shows to people: one self-contained page, or single figures."""

from __future__ import annotations

from .contents import Contents, gather
from .measure import agreement, measure, random_plans, uniform_plans
from .page import write_figures, write_report

__all__ = [
    "Contents",
    "agreement",
    "gather",
    "measure",
    "random_plans",
    "uniform_plans",
    "write_figures",
    "write_report",
]

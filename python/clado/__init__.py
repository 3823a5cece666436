"""Mixed-precision quantization of vision models with layer interactions and a certified optimum."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CladoError

if TYPE_CHECKING:
    from .corrector import correct
    from .evaluator import Score, evaluate, rerank
    from .exporter import apply, export, load
    from .plan import Plan
    from .profiler import plan_run, profile
    from .quantizer import Quantizer
    from .refiner import refine
    from .report import write_figures, write_report
    from .run_plan import RunPlan
    from .sensitivity import Layer, Sensitivity
    from .solver import LinearConstraint, Solver, given_plan, pareto, shortlist, solve

# Imported on first use, so that profiling needs neither timm nor pyscipopt and `import clado` is cheap. No module is named
# like a public function: importing it would put the module in the function's place.
_HOME = {
    "Layer": "sensitivity",
    "LinearConstraint": "solver",
    "Plan": "plan",
    "Quantizer": "quantizer",
    "Score": "evaluator",
    "Sensitivity": "sensitivity",
    "Solver": "solver",
    "apply": "exporter",
    "correct": "corrector",
    "shortlist": "solver",
    "evaluate": "evaluator",
    "export": "exporter",
    "given_plan": "solver",
    "load": "exporter",
    "pareto": "solver",
    "RunPlan": "run_plan",
    "plan_run": "profiler",
    "profile": "profiler",
    "refine": "refiner",
    "rerank": "evaluator",
    "solve": "solver",
    "write_figures": "report",
    "write_report": "report",
}

__all__ = [
    "CladoError",
    "Layer",
    "LinearConstraint",
    "Plan",
    "Quantizer",
    "RunPlan",
    "Score",
    "Sensitivity",
    "Solver",
    "apply",
    "correct",
    "evaluate",
    "export",
    "given_plan",
    "load",
    "pareto",
    "plan_run",
    "profile",
    "refine",
    "rerank",
    "shortlist",
    "solve",
    "write_figures",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clado' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

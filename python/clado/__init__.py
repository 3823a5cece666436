"""Mixed-precision quantization of vision models with layer interactions and a certified optimum."""

from typing import TYPE_CHECKING

from .common import CladoError, door

if TYPE_CHECKING:
    from .artifacts import Plan, Sensitivity
    from .deploy import apply, export, load, predicted_bytes, time_layers, verify
    from .improve import Score, correct, evaluate, finish, refine, rerank, smallest_within
    from .interop import backend
    from .profiling import RunPlan, plan_run, profile
    from .quant import Layer, Quantizer
    from .report import write_figures, write_report
    from .solver import LinearConstraint, Solver, given_plan, pareto, shortlist, solve
else:
    # Imported on first use, so that profiling needs neither timm nor pyscipopt and `import clado` is cheap. Neither a package
    # nor a file within one is named like a public name of the same place: importing it would put the module in the name's place.
    _public, __dir__ = door(__name__)

    def __getattr__(name):
        if name != "__version__":
            return _public(name)
        from importlib.metadata import version

        return version("clado")


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
    "backend",
    "correct",
    "evaluate",
    "export",
    "finish",
    "given_plan",
    "load",
    "pareto",
    "plan_run",
    "predicted_bytes",
    "profile",
    "refine",
    "rerank",
    "shortlist",
    "smallest_within",
    "solve",
    "time_layers",
    "verify",
    "write_figures",
    "write_report",
]

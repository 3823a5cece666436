"""The native search and proof on a :class:`Program`."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

import clado_ext

from .program import Program
from .shift import ConvexForm

Choice = NDArray[np.int64]
WORK = 5000  # matrix rows the heuristics may read per candidate
QUICK = 300  # the same for an answer at once


def search(
    program: Program, start: Choice | None, seed: int, deadline: float, target: float = -math.inf, work: int = 0
) -> Choice | None:
    """The best choice found, ``[L]`` candidates that meet every budget, or None; the same for the same seed."""
    choice, feasible = clado_ext.iqp_search(
        **_tensors(program),
        start=None if start is None else torch.from_numpy(start),
        seed=seed,
        work=work or WORK * program.size,
        seconds=max(0.0, deadline - time.monotonic()),
        target=target,
    )
    return choice.numpy() if bool(feasible) else None


def prove(
    program: Program,
    form: ConvexForm,
    incumbent: Choice | None,
    deadline: float,
    tolerance: float,
    nodes: int = 2**62,
) -> tuple[Choice | None, float, bool, NDArray[np.int64]]:
    """Branch and bound: the best choice known, a lower bound on every feasible choice, whether every node was closed,
    and the candidates that the root left alive. (None, inf, True) proves that no choice meets the budgets."""
    choice, alive, outcome = clado_ext.iqp_prove(
        **_tensors(program),
        quadratic=torch.from_numpy(form.quadratic),
        linear=torch.from_numpy(form.linear),
        multipliers=torch.from_numpy(form.multipliers),
        start=None if incumbent is None else torch.from_numpy(incumbent),
        point=torch.from_numpy(form.point(program)),
        removed=None if form.removed is None else torch.from_numpy(form.removed),
        constant=form.constant,
        slack=form.slack,
        tolerance=tolerance,
        nodes=nodes,
        seconds=max(0.0, deadline - time.monotonic()),
    )
    best = choice.numpy() if int(choice[0]) >= 0 else None
    return best, float(outcome[0]), bool(outcome[2]), np.flatnonzero(alive.numpy())


def _tensors(program: Program) -> dict[str, Any]:
    names = ("matrix", "starts", "rows", "limits")
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(program, name))) for name in names}


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """A context in which BLAS runs on ``count`` threads."""
    found: AbstractContextManager[Any] = _controller().limit(limits=count, user_api="blas")
    return found

"""``python -m bench.solve.brute_force [--count n] [--first seed]``: small random programs against trying every choice.

Every program (ties, zeros, negative entries, scales over 28 decades, one to three budgets, some exactly at their minimum)
is solved by every path of the solver: as usual, with the tighter form at every root, with the cheap spectral form, by SCIP,
by the heuristic alone, and with a gap to stop at. A bound above the optimum, an "optimal" that is none, a wrong
"infeasible" or a number that is not finite ends the run with the seed.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

import clado
from clado.solver import certify, objective_matrix
from tests.solver import instances

OBJECTIVES = ("original", "original", "clipped", "diagonal")


@contextmanager
def tight() -> Iterator[None]:
    """The tighter form after one node."""
    with mock.patch.object(certify, "NODES_WORK", 0):
        yield


@contextmanager
def spectral() -> Iterator[None]:
    """No semidefinite program."""
    with mock.patch.object(certify, "iteration_seconds", return_value=math.inf):
        yield


@contextmanager
def usual() -> Iterator[None]:
    yield


# How the solver is run, its arguments, and how often (one in so many seeds).
PATHS: list[tuple[str, Callable[[], Any], dict[str, Any], int]] = [
    ("auto", usual, {}, 1),
    ("tight", tight, {}, 1),
    ("spectral", spectral, {}, 3),
    ("heuristic", usual, {"solver": "heuristic"}, 1),
    ("scip", usual, {"solver": "scip"}, 10),
    ("gap 10 %", tight, {"gap": 0.1}, 3),
]


def check(seed: int, name: str, how: Callable[[], Any], arguments: dict[str, Any]) -> str:
    """Status of the plan; AssertionError where it disagrees with trying every choice."""
    case, objective = instances.instance(seed), OBJECTIVES[seed % 4]
    sens = case.sens
    with how():
        started = time.monotonic()
        plan = clado.solve(sens, **case.budgets, objective=objective, time_limit=120, **arguments)
        assert time.monotonic() - started < 121
    inside = sens.candidates.same_layer
    matrix = objective_matrix(sens.matrix, sens.stderr, inside, objective)
    value, mask = instances.values(sens, matrix), instances.within(sens, case.budgets)
    if not mask.any():
        assert plan.status == "infeasible"
        return plan.status
    scale = max(np.abs(value).max(), np.abs(np.diag(matrix)).sum())
    picked, best = sens.one_hot(plan.bits), value[mask].min()
    unit = max(abs(plan.objective), np.abs(np.diag(matrix)) @ picked / 2)
    assert math.isfinite(plan.objective)
    assert math.isfinite(plan.bound)
    assert abs(plan.objective - 0.5 * picked @ matrix @ picked) <= 1e-12 * scale
    assert plan.objective >= best - 1e-12 * scale
    assert plan.bound <= best + 1e-12 * scale, (plan.bound, best)
    assert all(use["used"] <= case.budgets[budget] * (1 + 1e-12) for budget, use in plan.usage.items())
    if plan.status == "optimal":
        assert plan.objective - best <= max(1e-6 * unit, 1e-12 * scale)
    if name in ("auto", "tight", "spectral", "scip"):
        assert plan.status == "optimal", plan.info
    if name == "gap 10 %":
        assert plan.info["relative_gap"] <= 0.1 * (1 + 1e-9)
    return plan.status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solve.brute_force", description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="programs")
    parser.add_argument("--first", type=int, default=100_000, help="first seed")
    options = parser.parse_args()
    seen = Counter[tuple[str, str]]()
    for seed in range(options.first, options.first + options.count):
        for name, how, arguments, every in PATHS:
            if seed % every == 0:
                try:
                    seen[name, check(seed, name, how, arguments)] += 1
                except AssertionError:
                    raise SystemExit(f"seed {seed}, {name}: {traceback.format_exc()}") from None
    for (name, status), count in sorted(seen.items()):
        print(f"{name:10} {status:10} {count:6}")
    print(f"{sum(seen.values())} answers to {options.count} programs agree with trying every choice")


if __name__ == "__main__":
    main()

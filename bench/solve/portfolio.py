"""The heuristic portfolio against proven optima: python -m bench.solve.portfolio

Every program is first closed by the exact solver; then the portfolio alone gets the same program, a fixed share of work and
no start. Reported: how often it finds the optimum, and its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

import clado
from bench.harness import machine
from bench.solve.families import NOISE, family
from clado.solver import native
from clado.solver.native import blas_threads
from clado.solver.program import Program

SHAPES = ("digits", "resnet50", "vit_b")
WIDTHS = ((2, 4, 8), (2, 3, 4, 6, 8))
BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
SECONDS = 1.0  # of the portfolio
PROOF = 10.0  # seconds of the exact solver


@dataclass(frozen=True)
class Case:
    """One proven program: how far above the optimum the portfolio ended, and when."""

    shape: str
    widths: int
    noise: str
    avg_bits: float
    seed: int
    excess: float
    seconds: float


def run(shape: str, bits: tuple[int, ...], noise: str, avg_bits: float, seed: int) -> Case | None:
    """None where the exact solver found no proof."""
    sens = family(shape, bits, NOISE[noise], seed)
    plan = clado.solve(sens, avg_bits=avg_bits, time_limit=PROOF)
    if plan.status != "optimal":
        return None
    numel = np.array([layer.numel for layer in sens.layers])
    layer = np.repeat(np.arange(len(numel)), len(bits))
    unit = max(abs(plan.objective), plan.values["diagonal"])
    limits = np.array([int(avg_bits * numel.sum())])
    program = Program(sens.matrix * (100 / unit), layer, np.outer(numel, bits).reshape(1, -1), limits)
    with blas_threads(1):
        started = time.monotonic()
        choice = native.search(program, None, seed, started + SECONDS)
        took = time.monotonic() - started
    value = np.inf if choice is None else program.value(choice)
    excess = value / 100 - plan.objective / unit
    return Case(shape, len(bits), noise, avg_bits, seed, max(0.0, excess), took)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solve.portfolio", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="write the cases to this file")
    options = parser.parse_args()
    cases, open_ = list[Case](), 0
    for shape in SHAPES:
        for bits in WIDTHS:
            for noise in NOISE:
                for avg_bits in BUDGETS:
                    for seed in range(options.seeds):
                        case = run(shape, bits, noise, avg_bits, seed)
                        open_ += case is None
                        cases += [] if case is None else [case]
    table = Table(box=None, header_style="bold")
    for name in ("shape", "|B|", "noise", "proven", "found", "worst excess", "median s", "longest s"):
        table.add_column(name, justify="left" if name in ("shape", "noise") else "right")
    for key in sorted({(case.shape, case.widths, case.noise) for case in cases}):
        group = [case for case in cases if (case.shape, case.widths, case.noise) == key]
        found = sum(case.excess <= 1e-6 for case in group)
        times = [case.seconds for case in group]
        cells = (f"{max(c.excess for c in group):.1e}", f"{statistics.median(times):.2f}", f"{max(times):.2f}")
        table.add_row(key[0], str(key[1]), key[2], str(len(group)), str(found), *cells)
    Console(width=110, highlight=False).print(table)
    found = sum(case.excess <= 1e-6 for case in cases)
    print(f"{found} of {len(cases)} proven optima found; {open_} programs were not proven in {PROOF:g} s and left out")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine(), "cases": [asdict(case) for case in cases]}, file, indent=1)


if __name__ == "__main__":
    main()

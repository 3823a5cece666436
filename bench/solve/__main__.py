"""``python -m bench.solve [family …] [--seconds s] [--rivals] [--json file]``: proofs of synthetic programs, and rivals.

Every row is one program: shape, number of widths, noise, bits on average. Ours is the whole call of ``clado.solve``; where
one budget is proven, the same program with a second one (a latency table at 97 % of the first plan's) comes next. Gaps are
(value − bound) over the larger of |value| and the diagonal part of our plan, so that they compare across solvers. CPU
seconds are of this process: what the solver costs where other work shares the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import clado
from bench.harness import machine
from bench.solve.families import NOISE, SHAPES, family, second_budget
from bench.solve.rivals import RIVALS
from clado import Sensitivity
from clado.solver.native import blas_threads
from clado.solver.program import Program

THREE, FIVE = (2, 4, 8), (2, 3, 4, 6, 8)
# (shape, widths, noise, seconds): the limit is what the proof is hoped to need at most.
ROWS = [
    ("digits", THREE, "small", 5),
    ("vit_b", THREE, "small", 5),
    ("resnet50", THREE, "small", 5),
    ("vit_b", THREE, "middle", 20),
    ("vit_b", THREE, "large", 20),
    ("vit_b", FIVE, "small", 15),
    ("vit_l", THREE, "small", 15),
    ("vit_l", FIVE, "small", 60),
    ("vit_g", THREE, "small", 30),
    ("deep300", THREE, "small", 90),
    ("deep1000", THREE, "small", 120),
]


@dataclass(frozen=True)
class Row:
    """One program solved by one solver."""

    shape: str
    widths: int
    noise: str
    avg_bits: float
    solver: str
    seconds: float
    cpu_seconds: float
    value: float
    gap: float


def solve_rows(shape: str, bits: tuple[int, ...], noise: str, avg_bits: float, seconds: float, seed: int) -> list[Row]:
    """Ours: one budget and, where that is proven, two."""
    sens = family(shape, bits, NOISE[noise], seed)
    plan, row = _ours(sens, (shape, len(bits), noise, avg_bits, "clado"), avg_bits=avg_bits, time_limit=seconds)
    if plan.status != "optimal":
        return [row]
    second = (shape, len(bits), noise, avg_bits, "clado, 2 budgets")
    more = _ours(sens, second, avg_bits=avg_bits, constraints=[second_budget(sens, plan.bits)], time_limit=seconds)[1]
    return [row, more]


def _ours(sens: Sensitivity, key: tuple[str, int, str, float, str], **arguments: Any) -> tuple[clado.Plan, Row]:
    started, cpu = time.perf_counter(), time.process_time()
    plan = clado.solve(sens, **arguments)
    times = (time.perf_counter() - started, time.process_time() - cpu)
    return plan, Row(*key, *times, plan.objective, plan.info["relative_gap"])


def rival_row(ours: Row, bits: tuple[int, ...], name: str, seconds: float, seed: int) -> Row | None:
    sens = family(ours.shape, bits, NOISE[ours.noise], seed)
    numel = np.array([layer.numel for layer in sens.layers])
    layer = np.repeat(np.arange(len(numel)), len(bits))
    limit = np.array([int(ours.avg_bits * numel.sum())])
    plan = clado.solve(sens, avg_bits=ours.avg_bits, time_limit=seconds, solver="heuristic")
    unit = max(abs(plan.objective), plan.values["diagonal"])
    program = Program(sens.matrix * (100 / unit), layer, np.outer(numel, bits).reshape(1, -1), limit)
    with blas_threads(1):
        started, cpu = time.perf_counter(), time.process_time()
        result = RIVALS[name](program, seconds)
        times = (time.perf_counter() - started, time.process_time() - cpu)
    if result is None:
        return None
    value, bound = result
    return Row(*list(asdict(ours).values())[:4], name, *times, value * unit / 100, (value - bound) / 100)


def show(rows: list[Row]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("shape", "|B|", "noise", "bits", "solver", "s", "CPU s", "loss increase", "gap"):
        table.add_column(name, justify="left" if name in ("shape", "noise", "solver") else "right")
    for row in rows:
        gap = "proven" if row.gap <= 1e-6 else f"{row.gap:.2%}"
        cells = (
            f"{row.avg_bits:g}",
            row.solver,
            f"{row.seconds:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.value:.6g}",
            gap,
        )
        table.add_row(row.shape, str(row.widths), row.noise, *cells)
    Console(width=110, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solve", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(SHAPES), help="which shapes; all when left out")
    parser.add_argument("--avg-bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--seconds", type=float, help="time limit of every solver, instead of each row's own")
    parser.add_argument("--rivals", action="store_true", help="run the other solvers that are installed as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    rows: list[Row] = []
    for shape, bits, noise, usual in ROWS:
        if shape not in options.families:
            continue
        seconds: Any = options.seconds or usual
        for avg_bits in options.avg_bits:
            ours = solve_rows(shape, bits, noise, avg_bits, seconds, options.seed)
            rows += ours
            if options.rivals:
                sens = family(shape, bits, NOISE[noise], options.seed)
                key = (shape, len(bits), noise, avg_bits, "SCIP on our form")
                rows.append(_ours(sens, key, avg_bits=avg_bits, time_limit=max(seconds, 60), solver="scip")[1])
                found = [rival_row(ours[0], bits, name, seconds, options.seed) for name in RIVALS]
                rows += [row for row in found if row is not None]
    show(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine(), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()

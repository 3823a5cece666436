"""``python -m bench.solve.frontier``: 30 budgets of a ViT-B-shaped program, and what-if questions on the loaded matrix."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import clado
from bench.harness import machine
from bench.solve.families import NOISE, family

BUDGETS = [2.2 + 0.2 * k for k in range(30)]
QUESTIONS: list[dict[str, Any]] = [
    {"avg_bits": 3.7},
    {"avg_bits": 4.3},
    {"avg_bits": 4.0, "pin": {"layer3": 8}},
    {"avg_bits": 4.0, "forbid": {"layer9": 2}},
    {"avg_bits": 4.0, "max_bits": {"layer20": 4}},
]


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    started, cpu = time.perf_counter(), time.process_time()
    answer = call()
    return answer, time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solve.frontier", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of a frontier")
    parser.add_argument("--noise", nargs="+", choices=list(NOISE), default=list(NOISE))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for noise in options.noise:
        sens = family("vit_b", noise=NOISE[noise])
        plans, wall, cpu = timed(lambda s=sens: clado.pareto(s, avg_bits=BUDGETS, time_limit=options.seconds))
        gaps = [plan.info["relative_gap"] for plan in plans]
        proven = sum(plan.status == "optimal" for plan in plans)
        print(f"{noise:7} frontier of 30: {wall:6.2f} s, CPU {cpu:6.2f} s, {proven} proven, worst gap {max(gaps):.2%}")
        results.append({"noise": noise, "frontier_seconds": wall, "frontier_cpu": cpu, "proven": proven, "gaps": gaps})
        solver = clado.Solver(sens)
        first = timed(lambda s=solver: s.solve(avg_bits=4.0, solver="heuristic"))
        asked = [timed(lambda s=solver, q=q: s.solve(**q, solver="heuristic")) for _ in range(20) for q in QUESTIONS]
        for plan, question in zip((plan for plan, _, _ in asked), QUESTIONS, strict=False):
            assert plan.bound <= clado.solve(sens, **question).objective
        walls, cpus = [wall for _, wall, _ in asked], [cpu for _, _, cpu in asked]
        gap = max(plan.info["relative_gap"] for plan, _, _ in asked)
        print(
            f"{noise:7} what if: first {first[1] * 1e3:.0f} ms, then median {statistics.median(walls) * 1e3:.1f} ms, "
            f"CPU {statistics.median(cpus) * 1e3:.1f} ms (most {max(cpus) * 1e3:.1f}), worst gap {gap:.2%}"
        )
        results[-1] |= {"what_if_first": first[1], "what_if_seconds": walls, "what_if_cpu": cpus, "what_if_gap": gap}
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()

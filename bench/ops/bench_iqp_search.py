"""iqp_search: a fixed number of matrix rows read; the rival is the same portfolio's core written in numpy."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

import clado_ext
from bench.harness import Case, Grid
from bench.solve.families import program

WORK = 200  # rows per candidate


def numpy_descent(matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> float:
    """From all-cheapest the best feasible one-layer move until none helps: one start of the many that a search makes."""
    g, first, use, most = (tensor.numpy() for tensor in (matrix, starts, rows, limits))
    layer = np.repeat(np.arange(len(first) - 1), np.diff(first))
    choice = first[:-1].copy()
    while True:
        gradient = g[:, choice].sum(axis=1) - np.where(np.isin(np.arange(len(g)), choice), np.diag(g), 0)
        gradient += np.diag(g) / 2
        change = gradient - gradient[choice][layer]
        extra = use - use[:, choice][:, layer]
        change[(extra > (most - use[:, choice].sum(axis=1))[:, None]).any(axis=0)] = np.inf
        best = int(change.argmin())
        if change[best] >= -1e-12:
            return float(g[np.ix_(choice, choice)].sum() / 2)
        choice[layer[best]] = best


def cases(grid: Grid) -> Iterator[Case]:
    if grid.device != "cpu" or grid.shapes or grid.dtypes:
        return
    for name, bits in (("vit_b", (2, 4, 8)), ("vit_l", (2, 4, 8))):
        tensors = program(name, bits, avg_bits=4.0)
        size = len(tensors["matrix"])

        def judge(got: tuple[Tensor, Tensor], tensors: dict[str, Tensor] = tensors) -> None:
            choice, feasible = got
            value = float(tensors["matrix"][choice][:, choice].sum() / 2)
            assert bool(feasible)
            assert value <= numpy_descent(**tensors) + 1e-12

        yield Case(
            "iqp_search",
            f"{name} V={size} {WORK} V rows",
            "float64",
            lambda t=tensors, n=size: clado_ext.iqp_search(**t, work=WORK * n),
            judge,
            WORK * size * size * 8,
            WORK * size * size,
            {"one numpy descent": lambda t=tensors: numpy_descent(**t)},
        )

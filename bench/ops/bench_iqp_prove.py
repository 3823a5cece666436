"""iqp_prove: whole proofs and nodes per second; for rivals see bench/solve."""

from collections.abc import Iterator

import torch
from torch import Tensor

import clado_ext
from bench.harness import Case, Grid
from bench.solve.families import convex, program


def cases(grid: Grid) -> Iterator[Case]:
    if grid.device != "cpu" or grid.shapes or grid.dtypes:
        return
    for name, bits in (("digits", (2, 4, 8)), ("vit_b", (2, 4, 8)), ("vit_b", (2, 3, 4, 6, 8))):
        tensors = program(name, bits, avg_bits=4.0)
        start, _ = clado_ext.iqp_search(**tensors)
        value = float(tensors["matrix"][start][:, start].sum() / 2)
        given = {**tensors, **convex(tensors), "start": start, "tolerance": 1e-6 * abs(value)}
        nodes = int(clado_ext.iqp_prove(**given)[2][1])

        def judge(got: tuple[Tensor, ...], value: float = value) -> None:
            _, _, outcome = got
            assert outcome[2] == 1
            torch.testing.assert_close(float(outcome[0]), value, rtol=1e-5, atol=0)

        size = len(tensors["matrix"])
        shape = f"{name} V={size} {nodes} nodes"
        work = nodes * size * size
        yield Case("iqp_prove", shape, "float64", lambda g=given: clado_ext.iqp_prove(**g), judge, 8 * work, 2 * work)

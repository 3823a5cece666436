"""pairwise_mse: flops are those of one triangle of the product, two per element and pair.

Shapes are V x N x M: perturbations, samples, elements of the output.
"""

from collections.abc import Iterator
from functools import partial

import torch

import clado_ext
from bench.harness import Case, Grid
from bench.ops.bench_pairwise_ce import Sums, within
from clado_ext.reference import pairwise_mse as oracle


def torch_product(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole product of every sample in float32; its sums over elements are float32 too."""
    a = 2 * torch.bmm(delta.transpose(0, 1), delta.permute(1, 2, 0)).double()
    return a.sum(0), a.square().sum(0)


def cases(grid: Grid) -> Iterator[Case]:
    large = ((300, 64, 98304),) if grid.device == "cuda" else ()
    for v, n, m in grid.shapes_or((50, 16, 50176), (196, 4, 98304), *large):
        delta = torch.randn(v, n, m, device=grid.device)

        def judge(got: Sums, delta: torch.Tensor = delta) -> None:
            some = torch.linspace(0, len(delta) - 1, 8, device=delta.device).long()  # of all that the case computes
            for x, wanted in zip(within(got, some), oracle.pairwise_mse(delta[some]), strict=True):
                # float32 products: 1e-6 of the norms of what is multiplied, which stand on the diagonal
                torch.testing.assert_close(x, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())

        yield Case(
            "pairwise_mse",
            f"V={v} N={n} M={m}",
            "float32",
            partial(clado_ext.pairwise_mse, delta),
            judge,
            delta.nbytes,
            v * (v + 1) * m * n,
            {"torch bmm": lambda d=delta: torch_product(d)},
            given=(delta,),
        )

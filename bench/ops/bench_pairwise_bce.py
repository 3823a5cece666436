"""pairwise_bce: a logarithm per element and pair, so that neither bytes nor flops of a product bound it; bytes are those of δ.

Shapes are V x N x M: perturbations, samples, logits of a sample.
"""

from collections.abc import Iterator
from functools import partial

import torch

import clado_ext
from bench.harness import Case, Grid
from bench.ops.bench_pairwise_ce import Sums, within
from clado_ext.reference import pairwise_bce as oracle


def torch_rows(logits: torch.Tensor, delta: torch.Tensor, per: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of torch at the same accuracy: s of every perturbation, log1p of its products by chunks of elements."""
    s = torch.sinh(delta / 2) / torch.cosh((logits + delta) / 2)
    total = torch.zeros(len(delta), len(delta), dtype=torch.float64, device=delta.device)
    squares = total.clone()
    for sample in s.split(per, 1):
        a = torch.zeros_like(total)
        for part in sample.split(64, 1):
            a += torch.log1p(part[:, None] * part[None, :]).sum(-1).double()
        total += a
        squares += a.square()
    return total, squares


def cases(grid: Grid) -> Iterator[Case]:
    large = ((300, 16, 50176),) if grid.device == "cuda" else ()
    for v, n, m in grid.shapes_or((50, 4, 50176), (196, 1, 50176), *large):
        logits, delta = 3 * torch.randn(n * m, device=grid.device), 0.1 * torch.randn(v, n * m, device=grid.device)

        def judge(got: Sums, logits: torch.Tensor = logits, delta: torch.Tensor = delta, per: int = m) -> None:
            some = torch.linspace(0, len(delta) - 1, 5, device=delta.device).long()  # of all that the case computes
            for x, wanted in zip(within(got, some), oracle.pairwise_bce(logits, delta[some], None, per), strict=True):
                # rows right to 1e-6 of themselves, whose sums stand on the diagonal
                torch.testing.assert_close(x, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())

        yield Case(
            "pairwise_bce",
            f"V={v} N={n} M={m}",
            "float32",
            partial(clado_ext.pairwise_bce, logits, delta, None, m),
            judge,
            logits.nbytes + delta.nbytes,
            0,
            {"torch log1p": lambda z=logits, d=delta, per=m: torch_rows(z, d, per)},
            given=(logits, delta, None, m),
        )

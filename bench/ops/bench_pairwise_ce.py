"""pairwise_ce: flops are those of one triangle of the product, two per class and pair.

Shapes are V x N x C. The last of the default ones, one sample of ImageNet-21k's classes, takes about half a minute; four samples,
`--shape 2000x4x21843`, take two or three. Without shapes a dense output is timed too, whose samples have many rows.
"""

from collections.abc import Iterator
from functools import partial

import torch

import clado_ext
from bench.harness import Case, Grid
from clado_ext.reference import pairwise_ce as oracle

Sums = tuple[torch.Tensor, torch.Tensor]


def torch_chunks(logits: torch.Tensor, delta: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of torch at the same accuracy: batched products of a few samples, log1p, float64 sums."""
    total = torch.zeros(len(delta), len(delta), dtype=torch.float64, device=delta.device)
    squares = total.clone()
    logs = logits.log_softmax(-1)
    for k in range(0, len(logits), chunk):
        d, log_p = delta[:, k : k + chunk], logs[k : k + chunk]
        u = torch.expm1(d - (log_p + d).logsumexp(-1, keepdim=True)) * (0.5 * log_p).exp()
        rows = u.transpose(0, 1)
        a = torch.log1p(torch.bmm(rows, rows.transpose(1, 2))).double()
        total += a.sum(0)
        squares += a.square().sum(0)
    return total, squares


def within(sums: Sums, some: torch.Tensor) -> Sums:
    """The pairs among some of the perturbations."""
    total, squares = sums
    return total[some][:, some], squares[some][:, some]


def close(got: Sums, wanted: Sums) -> None:
    for x, y in zip(got, wanted, strict=True):
        # float32 products: 1e-6 of the norms of their rows, which stand on the diagonal
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item())


def dense(device: str, v: int = 200, n: int = 2, positions: int = 1024, c: int = 21) -> Case:
    """Samples of many rows, a third of which count nothing. Its rival calls the op for rows that are samples of their own."""
    logits, delta = (
        3 * torch.randn(n * positions, c, device=device),
        0.1 * torch.randn(v, n * positions, c, device=device),
    )
    weight = torch.randint(0, 3, (n * positions,), device=device).clamp(max=1) / positions

    def judge(got: Sums) -> None:
        some = torch.arange(0, v, v // 8, device=device)
        close(within(got, some), oracle.pairwise_ce(logits, delta[some], weight, positions))

    return Case(
        "pairwise_ce",
        f"V={v} N={n} rows={positions} C={c}",
        "float32",
        partial(clado_ext.pairwise_ce, logits, delta, weight, positions),
        judge,
        logits.nbytes + delta.nbytes,
        v * (v + 1) * c * n * positions,
        {"a sample per row": lambda: clado_ext.pairwise_ce(logits, delta)},
        given=(logits, delta, weight, positions),
    )


def cases(grid: Grid) -> Iterator[Case]:
    if not grid.shapes:
        yield dense(grid.device)
    large = ((300, 1024, 1000),) if grid.device == "cuda" else ()
    for v, n, c in grid.shapes_or((50, 64, 1000), (150, 256, 1000), *large, (2000, 1, 21843)):
        logits, delta = 3 * torch.randn(n, c, device=grid.device), 0.1 * torch.randn(v, n, c, device=grid.device)

        def judge(got: Sums, logits: torch.Tensor = logits, delta: torch.Tensor = delta) -> None:
            some = torch.linspace(0, len(delta) - 1, 8, device=delta.device).long()  # of all that the case computes
            close(within(got, some), oracle.pairwise_ce(logits, delta[some]))

        chunks = [k for k in (8, 16, 32) if k <= max(n, 8)]
        rivals = {f"torch bmm by {k}": lambda z=logits, d=delta, k=k: torch_chunks(z, d, k) for k in chunks}
        yield Case(
            "pairwise_ce",
            f"V={v} N={n} C={c}",
            "float32",
            partial(clado_ext.pairwise_ce, logits, delta),
            judge,
            logits.nbytes + delta.nbytes,
            v * (v + 1) * c * n,
            rivals,
            given=(logits, delta),
        )

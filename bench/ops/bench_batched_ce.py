"""batched_ce: bytes are one read of the logits and of every change."""

from collections.abc import Iterator

import torch

import clado_ext
from bench.harness import Case, Grid
from clado_ext.reference import batched_ce as oracle


def torch_float64(logits: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """As accurate as ours: the definition in float64, one perturbation at a time."""
    clean = logits.double().log_softmax(-1)
    p = clean.exp()
    return torch.stack([(clean + d.double()).logsumexp(-1) - (p * d.double()).sum(-1) for d in delta])


def cases(grid: Grid) -> Iterator[Case]:
    for v, n, c in grid.shapes_or((150, 64, 1000), (150, 256, 1000), (96, 512, 10)):
        logits, delta = 3 * torch.randn(n, c, device=grid.device), 0.1 * torch.randn(v, n, c, device=grid.device)
        target = torch.randint(0, c, (n,), device=grid.device)
        for loss, labels in (("KL", None), ("CE", target)):

            def check(z: torch.Tensor = logits, d: torch.Tensor = delta, y: torch.Tensor | None = labels) -> None:
                got, wanted = clado_ext.batched_ce(z, d, y), oracle.batched_ce(z, d, y)
                torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-12 if y is None else 1e-7)

            yield Case(
                "batched_ce",
                f"V={v} N={n} C={c} {loss}",
                "float32",
                lambda z=logits, d=delta, y=labels: clado_ext.batched_ce(z, d, y),
                check,
                logits.nbytes + delta.nbytes,
                0,
                {"torch float64": lambda z=logits, d=delta: torch_float64(z, d)} if labels is None else {},
            )

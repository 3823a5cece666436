"""batched_ce: bytes are one read of the logits and of every change."""

from collections.abc import Iterator
from functools import partial

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
            given = (logits, delta) if labels is None else (logits, delta, labels)

            def judge(got: torch.Tensor, given: tuple[torch.Tensor, ...] = given) -> None:
                torch.testing.assert_close(
                    got, oracle.batched_ce(*given), rtol=2e-6, atol=1e-12 if len(given) == 2 else 1e-7
                )

            yield Case(
                "batched_ce",
                f"V={v} N={n} C={c} {loss}",
                "float32",
                partial(clado_ext.batched_ce, *given),
                judge,
                logits.nbytes + delta.nbytes,
                0,
                {"torch float64": lambda z=logits, d=delta: torch_float64(z, d)} if labels is None else {},
                given=given,
            )

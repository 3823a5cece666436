"""batched_ce: bytes are one read of the logits and of every change."""

from collections.abc import Iterator

import torch

import clado_ext
from bench.harness import Case
from clado_ext.reference import batched_ce as oracle


def torch_float64(logits: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """As accurate as ours: the definition in float64, one perturbation at a time."""
    clean = logits.double().log_softmax(-1)
    p = clean.exp()
    return torch.stack([(clean + d.double()).logsumexp(-1) - (p * d.double()).sum(-1) for d in delta])


def cases(device: str) -> Iterator[Case]:
    for v, n, c in [(150, 256, 1000), (96, 512, 10)]:
        logits, delta = 3 * torch.randn(n, c, device=device), 0.1 * torch.randn(v, n, c, device=device)

        def check(logits: torch.Tensor = logits, delta: torch.Tensor = delta) -> None:
            got, wanted = clado_ext.batched_ce(logits, delta), oracle.batched_ce(logits, delta)
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-12)

        yield Case(
            "batched_ce",
            f"V={v} N={n} C={c}",
            "float32",
            lambda z=logits, d=delta: clado_ext.batched_ce(z, d),
            check,
            logits.nbytes + delta.nbytes,
            0,
            {"torch float64": lambda z=logits, d=delta: torch_float64(z, d)},
        )

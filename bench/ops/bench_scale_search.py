"""scale_search over 95 steps: flops are eight per element, width and step (multiply, clamp, round, subtract, square, add)."""

from collections.abc import Iterator

import torch

import clado_ext
from bench.harness import Case
from clado_ext.reference import scale_search as oracle

BITS = (2, 4, 8)
STEPS = 95


def torch_loop(weight: torch.Tensor) -> torch.Tensor:
    """The usual loop over steps, all channels at once."""
    out = []
    for b in BITS:
        first = weight.abs().amax(1, keepdim=True) / (2 ** (b - 1) - 1)
        best, chosen = torch.full_like(first, torch.inf), first.clone()
        for k in range(STEPS):
            scale = first * (1 - k / 100)
            error = (
                ((weight / scale).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1) * scale - weight)
                .square()
                .sum(1, keepdim=True)
            )
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        out.append(chosen)
    return torch.stack(out)


def cases(device: str) -> Iterator[Case]:
    for rows, columns in [(768, 3072)] + ([(4096, 16384)] if device == "cuda" else []):
        weight = torch.randn(rows, columns, device=device)

        def check(weight: torch.Tensor = weight) -> None:
            got = clado_ext.scale_search(weight, BITS, steps=STEPS)
            for b, bits in enumerate(BITS):
                for n in (0, 5):
                    (tried, _), errors = (f(weight[n], bits, STEPS) for f in (oracle.grid, oracle.step_errors))
                    assert errors[tried == got[b, n, 0]].min() <= errors.min() * (1 + 1e-4)

        flops = 8 * weight.numel() * len(BITS) * STEPS
        yield Case(
            "scale_search",
            f"{rows}x{columns} 2,4,8 bit",
            "float32",
            lambda w=weight: clado_ext.scale_search(w, BITS, steps=STEPS),
            check,
            weight.nbytes,
            flops,
            {"torch loop": lambda w=weight: torch_loop(w)},
        )

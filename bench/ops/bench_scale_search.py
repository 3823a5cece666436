"""scale_search over 95 steps, alone and with the quantization that follows.

Flops are eight per element, width and step (multiply, clamp, round, subtract, square, add), nine by importance; steps that cannot
win are left out, so a share above 100 % is no error.
"""

from collections.abc import Iterator
from functools import partial

import torch

import clado_ext
from bench.harness import Case, Grid
from bench.ops.bench_fake_quant import plain
from clado_ext.reference import scale_search as oracle

BITS = (2, 4, 8)
STEPS = 95


def torch_loop(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The usual loop over steps, all channels at once."""
    out = []
    for b in BITS:
        first = weight.abs().amax(1, keepdim=True) / (2 ** (b - 1) - 1)
        best, chosen = torch.full_like(first, torch.inf), first.clone()
        for k in range(STEPS):
            scale = first * (1 - k / 100)
            codes = (weight / scale).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
            squares = (codes * scale - weight).square()
            error = (squares if importance is None else squares * importance).sum(1, keepdim=True)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        out.append(chosen)
    return torch.stack(out)


def cases(grid: Grid) -> Iterator[Case]:
    large = ((4096, 16384),) if grid.device == "cuda" else ()
    for rows, columns in grid.shapes_or((256, 768), (768, 3072), *large):
        weight = torch.randn(rows, columns, device=grid.device)
        importance = torch.randn(columns, device=grid.device).exp()  # inputs differ by a few magnitudes

        def check(weight: torch.Tensor = weight, importance: torch.Tensor | None = None) -> None:
            got = clado_ext.scale_search(weight, BITS, steps=STEPS, importance=importance)
            for b, bits in enumerate(BITS):
                for n in (0, min(5, len(weight) - 1)):
                    tried, _ = oracle.grid(weight[n], bits, STEPS)
                    errors = oracle.step_errors(weight[n], bits, STEPS, importance=importance)
                    assert errors[tried == got[b, n, 0]].min() <= errors.min() * (1 + 1e-4)

        flops = 8 * weight.numel() * len(BITS) * STEPS
        shape = f"{rows}x{columns} 2,4,8 bit"
        search = lambda w=weight: clado_ext.scale_search(w, BITS, steps=STEPS)  # noqa: E731
        loop = {"torch loop": lambda w=weight: torch_loop(w)}
        yield Case("scale_search", shape, "float32", search, check, weight.nbytes, flops, loop)
        search = lambda w=weight, h=importance: clado_ext.scale_search(w, BITS, steps=STEPS, importance=h)  # noqa: E731
        loop = {"torch loop": lambda w=weight, h=importance: torch_loop(w, h)}
        weighted = partial(check, importance=importance)
        moved, more = weight.nbytes + importance.nbytes, flops * 9 // 8
        yield Case("scale_search", f"{shape}, importance", "float32", search, weighted, moved, more, loop)
        whole = lambda w=weight: clado_ext.quantize_weight(w, BITS, steps=STEPS)  # noqa: E731
        loop = {"torch loop and formula": lambda w=weight: plain(w, torch_loop(w))}
        yield Case("quantize_weight", shape, "float32", whole, check, 4 * weight.nbytes, flops, loop)

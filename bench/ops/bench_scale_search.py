"""scale_search over 95 steps, alone and with the quantization that follows.

Flops are eight per element, width and step (multiply, clamp, round, subtract, square, add), nine by importance; steps that cannot
win are left out, so a share above 100 % is no error.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import clado_ext
from bench.harness import Case, Grid
from bench.ops.bench_fake_quant import plain
from clado_ext.reference import fake_quant as rounding
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


def error_of(row: torch.Tensor, scale: torch.Tensor, bits: int, importance: torch.Tensor | None) -> torch.Tensor:
    steps = (row / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    squares = (steps.double() * scale.double() - row.double()).square()
    return (squares if importance is None else squares * importance).sum()


def cases(grid: Grid) -> Iterator[Case]:
    large = ((4096, 16384),) if grid.device == "cuda" else ()
    for rows, columns in grid.shapes_or((256, 768), (768, 3072), *large):
        weight = torch.randn(rows, columns, device=grid.device)
        importance = torch.randn(columns, device=grid.device).exp()  # inputs differ by a few magnitudes

        def judge(got: torch.Tensor, weight: torch.Tensor = weight, importance: torch.Tensor | None = None) -> None:
            for b, bits in enumerate(BITS):
                for n in (0, min(5, len(weight) - 1)):
                    least = oracle.step_errors(weight[n], bits, STEPS, importance=importance).min()
                    error = error_of(weight[n], got[b, n], bits, importance)
                    if not error <= least * (1 + 1e-4):
                        raise AssertionError(
                            f"the error of row {n} at {bits} bits must be {least:.6g}, got {error:.6g}"
                        )

        flops = 8 * weight.numel() * len(BITS) * STEPS
        shape = f"{rows}x{columns} 2,4,8 bit"

        def judge_all(
            got: Sequence[torch.Tensor], judge: Callable[..., None] = judge, w: torch.Tensor = weight
        ) -> None:
            values, _, scale, *_ = got
            judge(scale)
            torch.testing.assert_close(values, rounding.fake_quant(w, scale, BITS)[0], rtol=0, atol=0)

        given: tuple[Any, ...] = (weight, BITS, -1, STEPS)
        search, loop = partial(clado_ext.scale_search, *given), {"torch loop": partial(torch_loop, weight)}
        yield Case("scale_search", shape, "float32", search, judge, weight.nbytes, flops, loop, given=given)
        whole = partial(clado_ext.quantize_weight, *given)
        loop = {"torch loop and formula": lambda w=weight: plain(w, torch_loop(w))}
        yield Case("quantize_weight", shape, "float32", whole, judge_all, 4 * weight.nbytes, flops, loop, given=given)
        given = (*given, importance)
        search, loop = partial(clado_ext.scale_search, *given), {"torch loop": partial(torch_loop, weight, importance)}
        weighted = partial(judge, importance=importance)
        moved, more, shape = weight.nbytes + importance.nbytes, flops * 9 // 8, f"{shape}, importance"
        yield Case("scale_search", shape, "float32", search, weighted, moved, more, loop, given=given)

"""scale_errors over ModelOpt's grid of 39 multiples of absmax.

Flops are nine per element and candidate: multiply, clamp, round, multiply, subtract, square, add.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import clado_ext
from bench.harness import Case, Grid
from clado_ext.reference.scale_errors import scale_errors as oracle

HIGH = 7
MULTIPLES = torch.linspace(0.25, 4.0, 39)


def torch_loop(weight: Tensor, scale: Tensor) -> Tensor:
    """The usual loop over candidates, all channels at once."""
    errors = []
    for s in scale:
        values = (weight / s).round().clamp(-HIGH - 1, HIGH) * s
        errors.append((values - weight).square().sum(1, keepdim=True))
    return torch.stack(errors)


def cases(grid: Grid) -> Iterator[Case]:
    large = ((4096, 16384),) if grid.device == "cuda" else ()
    for rows, columns in grid.shapes_or((256, 768), (768, 3072), *large):
        weight = torch.randn(rows, columns, device=grid.device)
        first = weight.abs().amax(1, keepdim=True) / HIGH
        scale = first * MULTIPLES.to(grid.device).view(-1, 1, 1)
        given = (weight, scale, -HIGH - 1, HIGH)

        def judge(got: Tensor, weight: Tensor = weight, scale: Tensor = scale) -> None:
            torch.testing.assert_close(got[::19], oracle(weight, scale[::19], -HIGH - 1, HIGH), rtol=1e-5, atol=0)

        yield Case(
            "scale_errors",
            f"{rows}x{columns} 4 bit, {len(scale)} candidates",
            "float32",
            partial(clado_ext.scale_errors, *given),
            judge,
            weight.nbytes + 3 * scale.nbytes,
            9 * weight.numel() * len(scale),
            {"torch loop": lambda w=weight, s=scale: torch_loop(w, s)},
            given=given,
        )

"""compensate at three widths, beside a column loop and the published lazy-block algorithm in torch, one width after the other.

Flops are two for each of the B·N·K²/2 multiply-adds; the ceiling is the rate of torch's matrix product.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import clado_ext
from bench.harness import Case, Grid

BITS = (2, 4, 8)
BLOCK = 128  # columns, as published


def rounded(column: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (column / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def column_loop(weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Losses of the rows; every column updates all columns after it at once."""
    w, loss = weight.clone(), torch.zeros(len(weight), device=weight.device)
    for i in range(w.shape[1]):
        error = (w[:, i] - rounded(w[:, i], scale, bits)) / factor[i, i]
        w[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        loss += error.square()
    return loss


def lazy_blocks(weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Losses of the rows; columns after a block are updated once by a matrix product (GPTQ, arXiv 2210.17323, algorithm 1)."""
    w, loss = weight.clone(), torch.zeros(len(weight), device=weight.device)
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        block, corner = w[:, first:last].clone(), factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            errors[:, i] = (block[:, i] - rounded(block[:, i], scale, bits)) / corner[i, i]
            block[:, i:] -= errors[:, i : i + 1] * corner[i, i:]
        w[:, last:] -= errors @ factor[first:last, last:]
        loss += errors.square().sum(1)
    return loss


def per_width(
    work: Callable[..., torch.Tensor], weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.stack([work(weight, factor[0], scale[b, :, 0], bits) for b, bits in enumerate(BITS)])


def cases(grid: Grid) -> Iterator[Case]:
    for rows, columns in grid.shapes_or((768, 768), (3072, 768), (768, 3072)):
        weight = torch.randn(rows, columns, device=grid.device)
        inputs = torch.randn(2 * columns, columns, device=grid.device, dtype=torch.float64)
        inputs += torch.randn(2 * columns, 1, device=grid.device, dtype=torch.float64)  # that go together
        moments = inputs.T @ inputs / len(inputs)
        moments += 0.01 * moments.diagonal().mean() * torch.eye(columns, device=grid.device)
        factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float()[None]
        scale = clado_ext.scale_search(weight, BITS, steps=20)
        ours = partial(clado_ext.compensate, weight, factor, scale, BITS)
        rivals = {
            "column loop": partial(per_width, column_loop, weight, factor, scale),
            "lazy blocks": partial(per_width, lazy_blocks, weight, factor, scale),
        }

        def check(
            run: Callable[[], tuple[torch.Tensor, torch.Tensor]] = ours,
            rivals: dict[str, Callable[[], torch.Tensor]] = rivals,
            weight: torch.Tensor = weight,
            scale: torch.Tensor = scale,
            moments: torch.Tensor = moments,
        ) -> None:
            """The losses are those of the codes, and within 0.1 % of the rivals' (whose sums have another order)."""
            codes, loss = run()
            theirs = {name: rival().double().sum(1) for name, rival in rivals.items()}
            for b, total in enumerate(loss.sum(1)):
                difference = clado_ext.dequantize(codes[b : b + 1], scale[b : b + 1])[0].double() - weight.double()
                own = (difference @ moments * difference).sum()
                assert abs(total - own) <= 1e-3 * own, (total, own)
                for name, sums in theirs.items():
                    assert abs(sums[b] - total) <= 1e-3 * total, name

        flops = len(BITS) * rows * columns**2
        shape = f"{rows}x{columns} 2,4,8 bit"
        yield Case("compensate", shape, "float32", ours, check, flops=flops, rivals=rivals)

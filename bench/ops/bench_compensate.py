"""compensate at three widths, beside GPTQ by other packages and by plain torch (a column loop, lazy blocks), width after width.

Flops are two for each of the B·N·K²/2 multiply-adds; the ceiling is the rate of torch's matrix product. Below the table are the
layer losses tr((W−Q)H(W−Q)ᵀ) at 2, 4 and 8 bits, in units of ours: of nearest rounding and of the rivals, which get the same
weight, moments, damping, scales and order. The packages also factorize in their time; the others and ours are given the factor.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import clado_ext
from bench import rivals
from bench.harness import Case, Grid

BITS = (2, 4, 8)
BLOCK = 128  # columns, as published
DAMPING = 0.01  # of the mean diagonal


def rounded(column: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (column / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def column_loop(weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Values; every column updates all columns after it at once."""
    w = weight.clone()
    for i in range(w.shape[1]):
        value = rounded(w[:, i], scale, bits)
        w[:, i + 1 :] -= ((w[:, i] - value) / factor[i, i])[:, None] * factor[i, i + 1 :]
        w[:, i] = value
    return w


def lazy_blocks(weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Values; columns after a block are updated once by a matrix product (GPTQ, arXiv 2210.17323, algorithm 1)."""
    w = weight.clone()
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        block, corner = w[:, first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            value = rounded(block[:, i], scale, bits)
            errors[:, i] = (block[:, i] - value) / corner[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * corner[i, i + 1 :]
            block[:, i] = value
        w[:, last:] -= errors @ factor[first:last, last:]
    return w


def per_width(
    work: Callable[..., torch.Tensor], weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.stack([work(weight, factor[0], scale[b, :, 0], bits) for b, bits in enumerate(BITS)])


def losses(weight: torch.Tensor, moments: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The layer's loss ``[B]`` of values ``[B, N, K]``, in float64."""
    difference = values.double() - weight.double()
    return (difference @ moments * difference).sum((1, 2))


def judge(
    weight: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor, got: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The losses are those of the codes, and no more than nearest rounding's."""
    codes, loss = got
    own = losses(weight, moments, clado_ext.dequantize(codes, scale))
    if not torch.all((loss.sum(1) - own).abs() <= 1e-3 * own):
        raise AssertionError(f"losses must be those of the codes, {own.tolist()}, got {loss.sum(1).tolist()}")
    most = losses(weight, moments, nearest(weight, scale))
    if not torch.all(own <= most):
        raise AssertionError(f"losses must be at most nearest rounding's, {most.tolist()}, got {own.tolist()}")


def nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.stack([rounded(weight, s, bits) for s, bits in zip(scale, BITS, strict=True)])


def compare(
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    weight: torch.Tensor,
    moments: torch.Tensor,
    scale: torch.Tensor,
    theirs: dict[str, torch.Tensor],
) -> dict[str, list[float]]:
    """Losses in units of ours; ours lie below nearest rounding's and above no rival's by more than 0.1 %."""
    own = losses(weight, moments, clado_ext.dequantize(run()[0], scale))
    all_of_them = {"nearest": nearest(weight, scale), **theirs}
    ratios = {name: losses(weight, moments, values) / own for name, values in all_of_them.items()}
    for name, ratio in ratios.items():
        assert torch.all(ratio >= (1 if name == "nearest" else 1 / 1.001)), (name, ratio)
    return {f"loss of {name}": ratio.tolist() for name, ratio in ratios.items()}


def cases(grid: Grid) -> Iterator[Case]:
    for rows, columns in grid.shapes_or((768, 768), (3072, 768), (768, 3072)):
        weight = torch.randn(rows, columns, device=grid.device)
        inputs = torch.randn(2 * columns, columns, device=grid.device, dtype=torch.float64)
        inputs += torch.randn(2 * columns, 1, device=grid.device, dtype=torch.float64)  # that go together
        moments = inputs.T @ inputs / len(inputs)
        damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(columns, device=grid.device)
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()[None]
        scale = clado_ext.scale_search(weight, BITS, steps=20)
        given = (weight, factor, scale, BITS)
        run = partial(clado_ext.compensate, *given)
        yield Case(
            "compensate",
            f"{rows}x{columns} 2,4,8 bit",
            "float32",
            run,
            partial(judge, weight, damped, scale),
            flops=len(BITS) * rows * columns**2,
            rivals={
                "column loop": partial(per_width, column_loop, weight, factor, scale),
                "lazy blocks": partial(per_width, lazy_blocks, weight, factor, scale),
                **rivals.compensate(weight, moments.float(), scale, BITS, DAMPING),
            },
            compare=partial(compare, run, weight, damped, scale),
            given=given,
        )

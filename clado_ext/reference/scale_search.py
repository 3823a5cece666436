"""Plain-torch twin of clado_ext.scale_search: every step of every group, errors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid(group: Tensor, bits: int, steps: int, symmetric: bool = True) -> tuple[Tensor, int]:
    """The scales tried for one group, float32 ``[steps]``, and the zero point they share."""
    w, tiny = group.float(), torch.finfo(torch.float32).tiny
    factors = torch.tensor([100 - k for k in range(steps)], dtype=torch.float32, device=group.device) / 100
    if symmetric:
        return torch.clamp(w.abs().max() / (2 ** (bits - 1) - 1) * factors, min=tiny), 0
    bottom, top = w.min().clamp(max=0), w.max().clamp(min=0)
    first = top / (2**bits - 1) - bottom / (2**bits - 1)
    zero = -(2 ** (bits - 1)) - int(torch.round(bottom / first.clamp(min=tiny)))
    return torch.clamp(first * factors, min=tiny), min(zero, 2 ** (bits - 1) - 1)


def step_errors(
    group: Tensor, bits: int, steps: int, symmetric: bool = True, importance: Tensor | None = None
) -> Tensor:
    """Squared error of every step, float64 ``[steps]``; weighted, unless nothing that could be wrong has weight."""
    tried, zero = grid(group, bits, steps, symmetric)
    scales, w = tried.double().unsqueeze(1), group.double().unsqueeze(0)
    codes = torch.round(w / scales).clamp(-(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero)
    squares = (codes * scales - w).square()
    if importance is not None and importance[group != 0].any():
        squares = squares * importance.double()
    return squares.sum(1)


def range_search(
    weight: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    steps: int = 95,
    importance: Tensor | None = None,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales float32 and zero points int8 ``[B, N, groups]``; see :func:`clado_ext.range_search`."""
    flat = weight.float().reshape(weight.shape[0], -1)
    size = flat.shape[1] if group_size == -1 else group_size
    groups = -(-flat.shape[1] // max(size, 1))
    scales = torch.ones(len(bits), len(flat), groups)
    zeros = torch.zeros(len(bits), len(flat), groups, dtype=torch.int8)
    shared = torch.ones_like(flat[:1]) if importance is None else importance.reshape(-1, flat.shape[1])
    weights = shared.repeat_interleave(len(flat) // len(shared), 0)
    for k, b in enumerate(bits):
        for n, (row, h) in enumerate(zip(flat, weights, strict=True)):
            for g, (group, part) in enumerate(zip(row.split(max(size, 1)), h.split(max(size, 1)), strict=True)):
                if group.any():
                    tried, zero = grid(group, b, steps, symmetric)
                    scales[k, n, g] = tried[step_errors(group, b, steps, symmetric, part).argmin()]
                    zeros[k, n, g] = zero
    return scales.to(weight.device), zeros.to(weight.device)


def scale_search(
    weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95, importance: Tensor | None = None
) -> Tensor:
    """float32 ``[B, N, groups]``; see :func:`clado_ext.scale_search`."""
    return range_search(weight, bits, group_size, steps, importance, symmetric=True)[0]

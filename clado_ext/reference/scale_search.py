"""Plain-torch twin of clado_ext.scale_search: every step of every group, errors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid(group: Tensor, bits: int, steps: int) -> Tensor:
    """The scales tried for one group, float32 ``[steps]``."""
    largest = group.float().abs().max()
    factors = torch.tensor([100 - k for k in range(steps)], dtype=torch.float32, device=group.device) / 100
    return torch.clamp(largest / (2 ** (bits - 1) - 1) * factors, min=torch.finfo(torch.float32).tiny)


def step_errors(group: Tensor, bits: int, steps: int) -> Tensor:
    """Squared error of every step, float64 ``[steps]``."""
    scales = grid(group, bits, steps).double().unsqueeze(1)
    w = group.double().unsqueeze(0)
    codes = torch.round(w / scales).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scales - w).square().sum(1)


def scale_search(weight: Tensor, bits: Sequence[int], group_size: int = -1, steps: int = 95) -> Tensor:
    """float32 ``[B, N, groups]``; see :func:`clado_ext.scale_search`."""
    flat = weight.float().reshape(weight.shape[0], -1)
    size = flat.shape[1] if group_size == -1 else group_size
    out = []
    for b in bits:
        rows = []
        for row in flat:
            groups = [g for g in row.split(max(size, 1)) if g.numel()]
            scales = [
                grid(g, b, steps)[step_errors(g, b, steps).argmin()] if g.any() else g.new_ones(()) for g in groups
            ]
            rows.append(torch.stack(scales))
        out.append(torch.stack(rows))
    return torch.stack(out)

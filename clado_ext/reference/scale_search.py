"""Plain-torch twin of clado_ext.scale_search: every step of every group, errors in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fake_quant import magnitudes, nearest_codes


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


def float_grid(group: Tensor, format: str, steps: int, tensor_scale: float = 1.0) -> Tensor:
    """The scales tried for one group, not all zeros, in a float format, float32, falling."""
    largest, absmax = magnitudes(format)[-1].item(), group.float().abs().max()
    if format.startswith("fp8"):
        factors = torch.tensor([100 - k for k in range(steps)], dtype=torch.float32) / 100
        return torch.clamp(absmax / largest * factors, min=torch.finfo(torch.float32).tiny)
    least = (101 - steps) / 100
    if format.startswith("mx"):
        own = min(max(math.frexp(absmax.item())[1] - math.frexp(largest)[1], -127), 127)
        powers = [own] if steps == 1 else range(own + 1, own - 9, -1)
        return torch.tensor([2.0**k for k in powers if -127 <= k <= 127 and (k >= own or 2.0 ** (k - own) >= least)])
    stored = magnitudes("fp8_e4m3").float()
    code = max(int(nearest_codes(absmax / largest * tensor_scale, "fp8_e4m3")), 1)
    if steps == 1:
        return stored[code : code + 1] / tensor_scale
    last = max(int(nearest_codes(stored[code] * torch.tensor(least, dtype=torch.float32), "fp8_e4m3")), 1)
    return stored[last : min(code + 8, 126) + 1].flip(0) / tensor_scale


def float_errors(group: Tensor, format: str, tried: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error of every scale, float64; weighted, unless nothing that could be wrong has weight."""
    w, scales = group.double().unsqueeze(0), tried.double().unsqueeze(1)
    values = magnitudes(format)[nearest_codes(w / scales, format)].copysign(w) * scales
    squares = (values - w).square()
    if importance is not None and importance[group != 0].any():
        squares = squares * importance.double()
    return squares.sum(1)

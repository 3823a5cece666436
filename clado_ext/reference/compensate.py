"""Plain-torch twin of clado_ext.compensate: column by column, float32 operation by operation as the definition says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._formats import FormatScale
from .fake_quant import FLOATS, magnitudes, nearest_codes, spread


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32, rounded once: the sum in float64 is rounded to odd, so that the second rounding does no harm."""
    product, addend = a.double() * b.double(), c.double()  # exact
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = (total.contiguous().view(torch.int64) & 1) == 0
    other = torch.nextafter(total, torch.where(lost > 0, torch.inf, -torch.inf).double())
    return torch.where(even & (lost != 0) & lost.isfinite(), other, total).float()


def compensate(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    group_size: int = -1,
    zero_point: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 codes ``[B, N, …]`` and float64 losses ``[B, N]``; see :func:`clado_ext.compensate`."""
    flat = weight.float().reshape(weight.shape[0], -1)
    rows, columns = flat.shape
    codes = torch.zeros(len(bits), rows, columns, dtype=torch.int8)
    loss = torch.zeros(len(bits), rows, dtype=torch.float64)
    share = rows // len(factor)
    for k, b in enumerate(bits):
        zero = torch.zeros_like(scale[k]) if zero_point is None else zero_point[k].float()
        scales, zeros = (spread(x, columns, group_size) for x in (scale[k], zero))
        for g, u in enumerate(factor):
            part = slice(g * share, (g + 1) * share)
            place = torch.arange(columns) if order is None else order[g]
            w, s, z = (x[part][:, place] for x in (flat, scales, zeros))
            for i in range(columns):
                low, high = -(2 ** (b - 1)) - z[:, i], 2 ** (b - 1) - 1 - z[:, i]
                step = torch.clamp(torch.round(w[:, i] / s[:, i]), low, high)
                error = (w[:, i] - step * s[:, i]) * (1 / u[i, i])
                codes[k, part, place[i]] = (step + z[:, i]).nan_to_num(0.0).to(torch.int8)
                loss[k, part] += error.double().square()
                w[:, i + 1 :] = multiply_add(-error[:, None], u[i, i + 1 :], w[:, i + 1 :])
    return codes.view(len(bits), *weight.shape), loss


def compensate_format(
    weight: Tensor, factor: Tensor, scale: FormatScale, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int8 codes ``[N, …]`` and float64 losses ``[N]``; see :func:`clado_ext.compensate_format`."""
    if scale.format not in FLOATS:
        zero = None if scale.zero_point is None else scale.zero_point[None]
        bits = (int(scale.format[3:]),)
        codes, loss = compensate(weight, factor, scale.scale[None], bits, scale.group_size, zero, order)
        return codes[0], loss[0]
    flat = weight.float().reshape(weight.shape[0], -1)
    rows, columns = flat.shape
    codes, loss = torch.zeros(rows, columns, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
    known, share, spreads = (
        magnitudes(scale.format).float(),
        rows // len(factor),
        spread(scale.scale, columns, scale.group_size),
    )
    for g, u in enumerate(factor):
        part = slice(g * share, (g + 1) * share)
        place = torch.arange(columns) if order is None else order[g]
        w, s = flat[part][:, place], spreads[part][:, place]
        for i in range(columns):
            x = w[:, i] / s[:, i]
            code = nearest_codes(x, scale.format)
            step = torch.where(x.isnan(), x, known[code].copysign(x))
            error = (w[:, i] - step * s[:, i]) * (1 / u[i, i])
            codes[part, place[i]] = torch.where(x.isnan(), 0, code + x.signbit() * FLOATS[scale.format][3])
            loss[part] += error.double().square()
            w[:, i + 1 :] = multiply_add(-error[:, None], u[i, i + 1 :], w[:, i + 1 :])
    return codes.to(torch.uint8).view(torch.int8).view(weight.shape), loss

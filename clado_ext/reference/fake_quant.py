"""Plain-torch twin of clado_ext.fake_quant: codes in float32 as the definition says, errors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(scale: Tensor, columns: int, group_size: int) -> Tensor:
    """Scales ``[N, groups]`` -> one per element ``[N, K]``."""
    size = columns if group_size == -1 else group_size
    return scale.repeat_interleave(max(size, 1), dim=-1)[:, :columns]


def quantize(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1) -> Tensor:
    """int8 codes ``[B, N, …]``; see :func:`clado_ext.quantize`."""
    flat = weight.float().reshape(weight.shape[0], -1)
    codes = []
    for b, s in zip(bits, scale, strict=True):
        steps = torch.round(flat / spread(s, flat.shape[1], group_size))
        codes.append(steps.clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1).nan_to_num(0.0).to(torch.int8).view(weight.shape))
    return torch.stack(codes)


def fake_quant(weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1) -> tuple[Tensor, Tensor]:
    """values ``[B, N, …]`` and squared errors ``[B, N]``; see :func:`clado_ext.fake_quant`. NaN is not carried."""
    flat = weight.float().reshape(weight.shape[0], -1)
    values, errors = [], []
    for codes, s in zip(quantize(weight, scale, bits, group_size), scale, strict=True):
        value = (codes.view(flat.shape).float() * spread(s, flat.shape[1], group_size)).to(weight.dtype)
        values.append(value.view(weight.shape))
        errors.append((value.double() - flat.double()).square().sum(1))
    return torch.stack(values), torch.stack(errors)

"""Plain-torch twin of clado_ext.fake_quant: steps in float32 as the definition says, errors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(scale: Tensor, columns: int, group_size: int) -> Tensor:
    """Scales ``[N, groups]`` -> one per element ``[N, K]``."""
    size = columns if group_size == -1 else group_size
    return scale.repeat_interleave(max(size, 1), dim=-1)[:, :columns]


def steps_and_zeros(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int, zero_point: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Steps (code - zero point) and zero points of every element at every width, float32 ``[N, K]`` each."""
    flat = weight.float().reshape(weight.shape[0], -1)
    out = []
    for k, b in enumerate(bits):
        zero = spread(
            torch.zeros_like(scale[k]) if zero_point is None else zero_point[k].float(), flat.shape[1], group_size
        )
        steps = torch.round(flat / spread(scale[k], flat.shape[1], group_size))
        out.append((torch.clamp(steps, -(2 ** (b - 1)) - zero, 2 ** (b - 1) - 1 - zero), zero))
    return out


def quantize(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1, zero_point: Tensor | None = None
) -> Tensor:
    """int8 codes ``[B, N, …]``; see :func:`clado_ext.quantize`."""
    pairs = steps_and_zeros(weight, scale, bits, group_size, zero_point)
    return torch.stack([(s + zero).nan_to_num(0.0).to(torch.int8).view(weight.shape) for s, zero in pairs])


def fake_quant(
    weight: Tensor, scale: Tensor, bits: Sequence[int], group_size: int = -1, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """values ``[B, N, …]`` and squared errors ``[B, N]``; see :func:`clado_ext.fake_quant`."""
    flat = weight.float().reshape(weight.shape[0], -1)
    values, errors = [], []
    for k, (steps, _) in enumerate(steps_and_zeros(weight, scale, bits, group_size, zero_point)):
        value = (steps * spread(scale[k], flat.shape[1], group_size)).to(weight.dtype)
        values.append(value.view(weight.shape))
        errors.append((value.double() - flat.double()).square().sum(1))
    return torch.stack(values), torch.stack(errors)

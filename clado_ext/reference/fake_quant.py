"""Plain-torch twin of clado_ext.fake_quant: steps in float32 as the definition says, errors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._formats import FormatScale

# (mantissa bits, exponent of the least normal value, largest code without a sign, code of the sign) of a format's elements.
FLOATS = {
    "fp8_e4m3": (3, -6, 126, 128),
    "fp8_e5m2": (2, -14, 123, 128),
    "mxfp8": (3, -6, 126, 128),
    "mxfp4": (1, 0, 7, 8),
    "nvfp4": (1, 0, 7, 8),
}


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


def magnitudes(format: str) -> Tensor:
    """Values of a float element's codes without a sign, in order, float64."""
    mantissa, least, last, _ = FLOATS[format]
    values = []
    for code in range(last + 1):
        exponent, rest = divmod(code, 2**mantissa)
        whole = rest if exponent == 0 else rest + 2**mantissa
        values.append(whole * 2.0 ** (max(exponent, 1) - 1 + least - mantissa))
    return torch.tensor(values, dtype=torch.float64)


def nearest_codes(x: Tensor, format: str) -> Tensor:
    """Codes without a sign nearest to ``|x|``, int64: one for every middle of two values that lies below; ties go to even."""
    known = magnitudes(format).to(x.device)
    size, codes = x.double().abs(), torch.zeros_like(x, dtype=torch.int64)
    for code, middle in enumerate((known[1:] + known[:-1]) / 2):
        codes += (size > middle) | ((size == middle) & (code % 2 == 1))
    return codes


def quantize_formats(weight: Tensor, scales: Sequence[FormatScale]) -> Tensor:
    """int8 codes ``[F, N, …]``; see :func:`clado_ext.quantize_formats`."""
    flat, out = weight.float().reshape(weight.shape[0], -1), []
    for to in scales:
        if to.format not in FLOATS:
            zero = None if to.zero_point is None else to.zero_point[None]
            out.append(quantize(weight, to.scale[None], (int(to.format[3:]),), to.group_size, zero)[0])
            continue
        x = flat / spread(to.scale, flat.shape[1], to.group_size)
        codes = nearest_codes(x, to.format) + x.signbit() * FLOATS[to.format][3]
        out.append(torch.where(x.isnan(), 0, codes).to(torch.uint8).view(torch.int8).view(weight.shape))
    return torch.stack(out)


def fake_quant_formats(weight: Tensor, scales: Sequence[FormatScale]) -> tuple[Tensor, Tensor]:
    """values ``[F, N, …]`` and squared errors ``[F, N]``; see :func:`clado_ext.fake_quant_formats`."""
    flat, values, errors = weight.float().reshape(weight.shape[0], -1), [], []
    for to in scales:
        if to.format in FLOATS:
            scale = spread(to.scale, flat.shape[1], to.group_size)
            x = flat / scale
            step = magnitudes(to.format).to(x.device)[nearest_codes(x, to.format)].float().copysign(x)
            value = (torch.where(x.isnan(), x, step) * scale).to(weight.dtype)
        else:
            zero = None if to.zero_point is None else to.zero_point[None]
            own = fake_quant(weight, to.scale[None], (int(to.format[3:]),), to.group_size, zero)[0][0]
            value = own.reshape(flat.shape)
        values.append(value.view(weight.shape))
        errors.append((value.double() - flat.double()).square().sum(1))
    return torch.stack(values), torch.stack(errors)

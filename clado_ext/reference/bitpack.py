"""Plain-torch twin of clado_ext.bitpack: every bit is written out."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 ``[..., K]`` -> int32 ``[..., ceil(K * bits / 32)]``; see :func:`clado_ext.pack`."""
    stored = codes.long() + 2 ** (bits - 1)
    stream = torch.stack([(stored >> b) & 1 for b in range(bits)], dim=-1).flatten(-2)
    padding = -stream.shape[-1] % 32
    stream = torch.nn.functional.pad(stream, (0, padding))
    stream = stream.view(*stream.shape[:-1], stream.shape[-1] // 32, 32)
    words = (stream << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`."""
    stream = ((packed.long().unsqueeze(-1) >> torch.arange(32, device=packed.device)) & 1).flatten(-2)
    stream = stream[..., : columns * bits].reshape(*stream.shape[:-1], columns, bits)
    stored: Tensor = (stream << torch.arange(bits, device=packed.device)).sum(-1)
    codes: Tensor = (stored - 2 ** (bits - 1)).to(torch.int8)
    return codes

"""In which arithmetic a model runs, and a copy of it that does; what enters a product in a low precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

LOW_PRECISIONS = ("tf32", "bfloat16")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64} | dict.fromkeys(LOW_PRECISIONS, torch.float32)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts off."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where device or dtype differ."""
    tensors = [*model.parameters(), *model.buffers()]
    fits = all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)
    return model if fits else copy.deepcopy(model).to(device, dtype)


class Precision:
    """How matrix products round their operands; sums are float32."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.half = name == "bfloat16"  # what leaves a product, or enters the next one, is bfloat16; sums are float32
        self._emulated = name == "tf32" and device.type != "cuda"

    def operand(self, x: Tensor) -> Tensor:
        """What enters a product; TF32 is rounded here where no hardware does it."""
        if self.name == "bfloat16":
            return x.bfloat16()
        return _round_tf32(x) if self._emulated else x

    def product(self) -> AbstractContextManager[None]:
        """Where products run."""
        return _tf32_units() if self.name == "tf32" and not self._emulated else nullcontext()


def _round_tf32(x: Tensor) -> Tensor:
    """Ten bits behind the point, half to even; NaN and infinity stay."""
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


@contextmanager
def _tf32_units() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False

"""In which arithmetic a model runs, and a copy of it that does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .carried import LOW_PRECISIONS

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

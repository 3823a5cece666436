"""The nets of the record and of the golden sets, and their data: the same bits on every machine, and for good.

The weights come from integers alone; torch's own generators round differently where the processor has other instructions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from clado.digits import load_data, load_model
from tests.models import small_cnn, tiny_vit


def cnn() -> nn.Module:
    """Batch norm, a depthwise convolution and a weight used twice; images ``[N, 1, 8, 8]``, ten classes."""
    return exact(small_cnn()[0])


def vit() -> nn.Module:
    """Two blocks; images ``[N, 1, 8, 8]``, ten classes."""
    return exact(tiny_vit()[0])


def digits_vit() -> nn.Module:
    """The trained ViT of eight blocks on the digits."""
    return load_model()


class Unexportable(nn.Module):
    """A model whose Python reads a value, which no graph can hold."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.abs().sum()) >= 0 else x


def images(count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Digits float32 ``[count, 1, 8, 8]`` and labels int64 ``[count]``."""
    x, y = load_data("sensitivity")
    return x[first : first + count].clone(), y[first : first + count].clone()


def exact(model: nn.Module) -> nn.Module:
    """``model`` with new weights and statistics: whole thousandths, scaled by what IEEE arithmetic rounds correctly."""
    numbers = np.random.default_rng(0)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point():
                steps = numbers.integers(-1000, 1001, tuple(tensor.shape)) / 1000
                tensor.copy_(torch.from_numpy(np.asarray(_scaled(name, steps))))
    return model.eval()


def _scaled(name: str, steps: np.ndarray) -> np.ndarray:
    if steps.ndim > 1:
        return steps * np.sqrt(3 / steps[0].size)  # the variance of a lively net: one over the inputs
    if name.endswith("running_var"):
        return 1 + np.abs(steps)
    return 1 + 0.3 * steps if "norm" in name and name.endswith("weight") else 0.3 * steps
